"""Every setting at its default, the TruePose paper's value where it has one; other configs start from here.

truepose_jax/config/schema.py is the list of the settings, with what each means and may be.
"""

from ml_collections import ConfigDict

from truepose_jax.config import Config, to_dict


def get_config() -> ConfigDict:
    return ConfigDict(to_dict(Config()))
