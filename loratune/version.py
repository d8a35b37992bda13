"""The version of the package, below every module that stores it in a file."""

__version__ = "0.1.0"
