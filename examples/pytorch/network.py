"""The network: the same for training and for the handler, which imports it from the project."""

from torch import nn

CLASSES = ("sine", "square", "sawtooth")


def make_network():
    return nn.Sequential(
        nn.Conv1d(1, 16, kernel_size=7, padding=3),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(16, 32, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(4),
        nn.Flatten(),
        nn.Linear(128, len(CLASSES)),
    )
