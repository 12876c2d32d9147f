"""Every setting of a method at its default, the paper's value where it has one; other configs start from here.

truepose_jax/config/schema.py is the list of the settings, with what each means and may be; model.py beside it those of
config.model.
"""

from ml_collections import ConfigDict

from truepose_jax.config import MODELS, Config, to_dict


def get_config(method: str = "truepose") -> ConfigDict:
    return ConfigDict(to_dict(Config(model=MODELS[method]())))
