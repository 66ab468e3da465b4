"""Placeholder."""


def report(experiment, folders):
    raise NotImplementedError
