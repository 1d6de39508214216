"""Figures read back, by the labels of what they draw; and a clock for what is drawn in time."""


class Clock:
    """Seconds that pass only when a test, or a drawing, says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def line(ax, label):
    (found,) = [drawn for drawn in ax.get_lines() if drawn.get_label() == label]
    return found


def labels(ax):
    return [drawn.get_label() for drawn in ax.get_lines()]
