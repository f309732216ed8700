"""Shared by all tests."""

import logging

pytest_plugins = ["pytester"]

# Lightning's remarks about devices and loaders are not what these tests are about.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
