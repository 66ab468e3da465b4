"""The presets, each with the command that runs it, its cost and its result."""

from examples.cifar_lt.configs import best, mini, paper, smoke

CONFIGS = {"smoke": smoke.CONFIG, "mini": mini.CONFIG, "paper": paper.CONFIG, "best": best.CONFIG}
