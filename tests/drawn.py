"""Figures read back by the labels of what they draw; a clock for what is drawn in time; hostile text."""

HOSTILE = """<script>alert('1')</script> <img onerror="alert(2)"> & $x$ $\\bad{ | a | `b` **c** [d](e)"""


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


def legend(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]
