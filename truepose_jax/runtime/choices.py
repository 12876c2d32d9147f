"""Names that users choose among, which flags and the code that acts on them both know; light to import."""

WEIGHTS = {"ema": "ema", "raw": "params"}
"""What a user calls the weights -> the part of a checkpoint that holds them."""

NAMINGS = {"cfld": "{source}_to_{target}.png", "pidm": "{source}_2_{target}_vis.png"}
"""Of the pictures of records (inference/record_requests.py)."""

OUTSIDE = ("decoded", "pasted")
"""What lies outside of the region of an edit (sampling/inpainting.py)."""

FILLS = ("pose", "source")
"""What tiles of a canvas hold that nothing was asked for: the last pose again (IMAGPose's T1), or the last source (its T2)."""

SCENARIOS = ("T1", "T2", "T3", "star")
"""Of IMAGPose, for the pairs of records: one source, and its pose in all other tiles; one source in three tiles; three photos of
the person; three poses at once."""

SYNTHETIC = "synthetic"
"""In the place of a folder of photos: drawn people."""

SAMPLERS = {"ddim": "DDIM", "ddpm": "DDPM", "dpmpp_2m": "DPM-Solver++ 2M", "unipc": "UniPC"}
"""Of the diffusion (diffusion/samplers.py) -> as people write them."""

DTYPES = ("float32", "bfloat16")
"""What the networks may compute in."""
