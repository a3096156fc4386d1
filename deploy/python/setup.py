"""Builds the package; the protobuf code is generated first, so it need not be committed."""

import pathlib
import sys

from setuptools import setup

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import generate_protos  # noqa: E402  (found beside this file)

generate_protos.generate()
setup()
