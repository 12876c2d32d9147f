"""IMAGPose on Market-1501 (SSIM .3282, LPIPS .2104, FID 12.659): its 128x64 photos enlarged to tiles of 256x128.

    python -m truepose_jax.train --config=configs/imagpose_market.py:stage1 --workdir=DIR --config.data.root=MARKET ...

As imagpose_deepfashion_512.py (see there for the stages and the folders). MARKET: what `prepare build --dataset=market1501`
wrote; its results are resized to 128x64 to be judged. Not run by us.
"""

from configs import imagpose_deepfashion_512


def get_config(variant: str = "stage3"):
    config = imagpose_deepfashion_512.get_config(variant)
    config.model.size = (256, 128)
    config.data.root = "data/market1501"
    return config
