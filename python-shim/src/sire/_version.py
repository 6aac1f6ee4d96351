"""The one place that states the package's version; the build and the library check read it."""

__version__ = "0.1.0"
