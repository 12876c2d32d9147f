"""From rows of numbers per pair to what can be said: means with intervals, paired differences, a table and a sheet."""

from __future__ import annotations

import itertools
import json
import pathlib
import platform
import re
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image

from configs.variants import READINGS, RECIPE, VARIANTS
from experiments.ablation_runs import ATTENTION, PAIRS, PATTERNS, SHOWN, STEPS, TRAIN_PAIRS, Bench
from truepose_jax.runtime.markdown import narrow, table
from truepose_jax.sampling.image_grid import sheet

METRICS = ("psnr_person", "psnr_clothes", "psnr_face", "psnr", "ssim", "psnr_carried")
TITLES = ("person", "clothes", "face", "PSNR", "SSIM", "carried")
COMPARED = METRICS[:5]
DIGITS = {"swap_image_swapped": 2, "swap_tokens_swapped": 2, "sharpness": 2, "outline_error": 1} | dict.fromkeys(
    ATTENTION, 2
)
"""What a seed has one number of, and how exactly a table says it."""
ONCE = ("image swapped", "tokens swapped", "sharpness", "outline", "HPFA tokens", "inside", "half cells", "inside")
"""Their titles."""
PAPER_ORDER = ("full", "B3", "B4", "B2", "B1")
"""By LPIPS, SSIM and PSNR in the paper's Table 2, best first."""
PAPER = {
    "full": (17.627, 0.7444),
    "B3": (17.426, 0.7363),
    "B4": (16.686, 0.7149),
    "B2": (16.267, 0.7059),
    "B1": (14.613, 0.6895),
}
"""(PSNR, SSIM) published, DeepFashion 512x352."""
CLOTHES = {
    "solid": "plain clothes",
    "mixed": "plain clothes (half of them) and patterned ones",
    "all": "patterned clothes",
}
DRAWS = 2_000
LEAST_SEEDS = 3
"""Under which nothing is called better or worse."""
GATE = 3.0
"""dB inside the person that another source image must cost with CAA off (B3) before the comparison means anything."""

Rows = Mapping[str, Mapping[str, np.ndarray]]
"""variant -> metric -> [seeds pairs]; those of DIGITS, and the number of the seed as "seed", [seeds]."""


def read(bench: Bench, variants: Iterable[str]) -> dict[str, dict[str, np.ndarray]]:
    """The rows there are, seeds in order."""
    found = {}
    for variant in variants:
        folder = bench.row(variant, 0).parent
        paths = {int(m[1]): p for p in folder.glob("*.npz") if (m := re.fullmatch(rf"{variant}_(\d+)\.npz", p.name))}
        rows = [dict(np.load(path, allow_pickle=False)) | {"seed": seed} for seed, path in sorted(paths.items())]
        if rows:
            found[variant] = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return found


def interval(values: np.ndarray, who: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): 95 % bootstrap of values [seeds pairs] over seeds and people, NaN left out.

    who: int [pairs], the person of each: their pairs are drawn together, for they are alike. With three seeds the
    interval's own uncertainty is large.
    """
    random = np.random.default_rng(seed)
    (s, _), people = values.shape, who.max() + 1
    seeds_drawn = random.multinomial(s, np.full(s, 1 / s), DRAWS)
    people_drawn = random.multinomial(people, np.full(people, 1 / people), DRAWS)[:, who]
    there = np.isfinite(values)
    sums = ((seeds_drawn @ np.where(there, values, 0.0)) * people_drawn).sum(1)
    counts = ((seeds_drawn @ there) * people_drawn).sum(1)
    low, high = np.percentile(sums[counts > 0] / counts[counts > 0], [2.5, 97.5])
    return float(np.nanmean(values)), float(low), float(high)


def difference(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], metric: str) -> dict:
    """Of rows a - b of a metric, paired by seed and pair: {"interval", "by_seed": means}; NaN without a common seed."""
    seeds = np.intersect1d(a["seed"], b["seed"])
    if not len(seeds):
        return {"interval": (float("nan"),) * 3, "by_seed": []}
    values = a[metric][np.isin(a["seed"], seeds)] - b[metric][np.isin(b["seed"], seeds)]
    return {"interval": interval(values, a["who"][0]), "by_seed": [float(np.nanmean(x)) for x in values]}


def verdict(found: Mapping) -> str:
    """Of a `difference`: three seeds at least, all of one sign, and 0 outside the interval."""
    (mean, low, high), seeds = found["interval"], np.sign(found["by_seed"])
    if len(seeds) < LEAST_SEEDS:
        return f"({len(seeds)} seed{'s' * (len(seeds) != 1)})"
    if low <= 0 <= high or len(set(seeds)) > 1:
        return "not distinguished"
    return "better" if mean > 0 else "worse"


def summary(rows: Rows) -> dict:
    """Everything the report says, as plain numbers (None: the network has no such attention)."""
    variants, who = {}, next(iter(rows.values()))["who"][0]
    for name, row in rows.items():
        found = {metric: interval(row[metric], who) for metric in METRICS}
        found |= {key: [float(x) if np.isfinite(x) else None for x in row[key]] for key in DIGITS}
        found["seeds"] = len(row["psnr"])
        found["seed_means_psnr_person"] = [float(np.nanmean(x)) for x in row["psnr_person"]]
        variants[name] = found
    differences = {}
    if "full" in rows:
        for name in (name for name in rows if name != "full"):
            differences[name] = {m: difference(rows[name], rows["full"], m) for m in METRICS}
    order = [name for name in PAPER_ORDER if name in rows]
    steps = {f"{a} > {b}": {m: difference(rows[a], rows[b], m) for m in METRICS} for a, b in itertools.pairwise(order)}
    return {"variants": variants, "against_full": differences, "paper_order": steps}


def variants_table(found: dict, names: Iterable[str]) -> list[str]:
    rows = []
    for name in names:
        v = found["variants"][name]
        cells = [_cell(v[metric], digits=3 if metric == "ssim" else 2) for metric in METRICS]
        cells += ["-" if None in v[key] else f"{np.mean(v[key]):.{digits}f}" for key, digits in DIGITS.items()]
        rows.append([name, str(v["seeds"]), *cells])
    return table(("variant", "seeds", *TITLES, *ONCE), rows)


def _comparison(title: str, found: Mapping[str, Mapping[str, dict]]) -> list[str]:
    names = dict(zip(METRICS, TITLES, strict=True))
    rows = []
    for name, of in found.items():
        cells = [f"{verdict(of[m])} {_cell(of[m]['interval'], 3 if m == 'ssim' else 2)}" for m in COMPARED]
        cells.append(", ".join(f"{seed:.2f}" for seed in of["psnr_person"]["by_seed"]))
        rows.append([name, *cells])
    return table((title, *(names[m] for m in COMPARED), "person, by seed"), rows)


def _cell(value: tuple[float, float, float], digits: int = 2) -> str:
    mean, low, high = value
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def markdown(found: dict, bench: Bench) -> str:
    names = [n for n in PAPER_ORDER if n in found["variants"]]
    lines = [
        "# Ablations on synthetic people",
        "",
        f"`python experiments/ablation.py --scratch=runs/ablation --steps={bench.steps} --patterns={bench.patterns}` (and with",
        f"`--recipe`, `--sweep`), {platform.machine()} CPU.",
        f"{PAIRS} pairs of held-out people in {CLOTHES[bench.patterns]}, 64x48, {bench.steps} steps of 12 targets "
        f"({TRAIN_PAIRS:,} training pairs),",
        "4 DDIM steps, EMA weights, no guidance. Mean (95 % bootstrap over seeds and people); PSNR in dB, `person` to `face`",
        "inside that region; SSIM Gaussian, 11 taps. LPIPS and FID need pretrained networks and are not here.",
        "`swapped`: dB lost inside the person with another person's source image; tokens, of the whole image, which alone B2",
        "and B3 read in attn2, and of the regions. `sharpness`: mean gradient inside the person, made / true; `outline`: mean",
        "error in grey levels about the true outline. What attention carries: `carried`, PSNR inside the person of the source as",
        "the half-cell head (without: the last HPFA) carries it; the effective number of tokens that a query looks at (exp of",
        "the entropy; of 48 in HPFA, the mean of its full-size sites, of 192 half cells) and the share inside its mask. The",
        "settings: configs/synthetic_ablation.py and variants.py. The region encoder is a small CLIP trained on other synthetic",
        "people and frozen (configs/synthetic_clip.py). What is ours and not the paper's is on in all but the recipe's rows.",
        "",
        *variants_table(found, names),
        "",
    ]
    if "B3" in found["variants"]:
        cost = float(np.mean(found["variants"]["B3"]["swap_image_swapped"]))
        word = "passed" if cost >= GATE else "NOT passed: the comparison below says little"
        lines += [
            f"Gate: with CAA off (B3) another source image costs {cost:.2f} dB inside the person; {GATE:g} are asked: {word}.",
            "",
        ]
    lines += [
        "The paper's order by PSNR and SSIM (512x352, DeepFashion: "
        + ", ".join(f"{n} {PAPER[n][0]:.2f} / {PAPER[n][1]:.3f}" for n in PAPER_ORDER)
        + "), step by step:",
        "",
        *_comparison("is the first better?", found["paper_order"]),
        "",
        "Against the full model:",
        "",
        *_comparison("variant, less `full`", {n: of for n, of in found["against_full"].items() if n in names}),
        "",
        f"Better, worse: {LEAST_SEEDS} seeds of one sign and 0 outside the interval; else not distinguished. `person` was the",
        "measure chosen beforehand; the others are given beside it, without a correction for looking at several. Resampling",
        "three seeds makes intervals too narrow: look at the seeds themselves. Of one seed they are over people alone, and two",
        "seeds of one variant may differ as much.",
        "",
        f"{stem(bench)}.png: the first seed of each, the first {SHOWN} pairs, not chosen.",
    ]
    for title, of in (("Without what is ours", RECIPE), ("Readings", READINGS)):
        if there := [n for n in of if n in found["variants"]]:
            lines += ["", f"## {title} (against `full`'s same seeds)", "", *variants_table(found, there), ""]
            lines += _comparison(
                "less `full`", {n: found["against_full"][n] for n in there if n in found["against_full"]}
            )
    return "\n".join(lines) + "\n"


def stem(bench: Bench) -> str:
    """Of the report's files."""
    return "ablation" if (bench.steps, bench.patterns) == (STEPS, PATTERNS) else f"ablation_{bench.name}"


def would_lose(bench: Bench, out: pathlib.Path, wanted: Iterable[tuple[str, int]]) -> str | None:
    """A variant of the report in `out` with more seeds than the rows there are and the wanted (variant, seed) will have."""
    path, seeds = out / f"{stem(bench)}.json", {}
    if not path.is_file():
        return None
    for variant, row in read(bench, VARIANTS).items():
        seeds[variant] = {int(seed) for seed in row["seed"]}
    for variant, seed in wanted:
        seeds.setdefault(variant, set()).add(seed)
    reported = {name: of["seeds"] for name, of in json.loads(path.read_text())["variants"].items()}
    lost = (name for name, count in reported.items() if len(seeds.get(name, ())) < count)
    return next((f"{path} has {reported[name]} seeds of {name}" for name in lost), None)


def write(bench: Bench, out: pathlib.Path) -> list[pathlib.Path]:
    """Of `stem` .json, .md and .png; nothing where there are no rows."""
    rows = read(bench, VARIANTS)
    if not rows:
        return []
    out.mkdir(parents=True, exist_ok=True)
    about = {"steps": bench.steps, "patterns": bench.patterns}
    found = summary(rows) | about | {"machine": platform.machine(), "python": platform.python_version()}
    paths = [out / f"{stem(bench)}.{end}" for end in ("json", "md", "png")]
    paths[0].write_text(json.dumps(found, indent=1) + "\n")
    paths[1].write_text(narrow(markdown(found, bench)))
    first = next(iter(rows.values()))
    columns = {"source": first["source"][0], "pose": first["pose"][0], "truth": first["target"][0]}
    columns |= {name: rows[name]["shown"][0] for name in (*PAPER_ORDER, *RECIPE) if name in rows}
    Image.fromarray(sheet({name: cells[:SHOWN] for name, cells in columns.items()})).save(paths[2])
    return paths
