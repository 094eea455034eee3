"""Only `jointcompress.methods` is installed, found by rule: top-level packages called `methods` or `tests` would
overwrite, or be overwritten by, those of other projects. The harness runs from the clone."""

from setuptools import find_packages, setup

setup(packages=[f"jointcompress.{name}" for name in find_packages(include=["methods", "methods.*"])],
      package_dir={"jointcompress.methods": "methods"}, package_data={"jointcompress.methods": ["py.typed"]})
