"""Figures read back, by the labels of what they draw."""


def line(ax, label):
    (found,) = [drawn for drawn in ax.get_lines() if drawn.get_label() == label]
    return found


def labels(ax):
    return [drawn.get_label() for drawn in ax.get_lines()]
