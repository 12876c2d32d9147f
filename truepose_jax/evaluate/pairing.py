"""Which generated image is to be compared with which reference: by name, in the spellings that are about.

| rule | generated | reference |
|---|---|---|
| same name | `a/b.png` | `a/b.jpg`, or DeepFashion's image in any of its five spellings (CFLD's lists) |
| SOURCE_2_TARGET | `SOURCE_2_TARGET_vis.png` (GFLA, PIDM, FPDM) | TARGET |
| SOURCE_to_TARGET | `SOURCE_to_TARGET.png` (PCDM; ours) | TARGET |
| SOURCE___TARGET | `SOURCE.jpg___TARGET.jpg_vis.png` (PATN) | TARGET |
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image

from input_pipeline.annotations.keypoints import name_key
from input_pipeline.annotations.photo import EXIF_ORIENTATION, open_picture
from input_pipeline.files import open_plain, read_list
from input_pipeline.schema import InputError
from input_pipeline.sources.folder import (
    PARSING_FOLDERS,
    PHOTO_FOLDERS,
    PHOTO_SUFFIXES,
    POSE_FOLDERS,
    files_under,
    first_folder,
)

SAME_NAME = "same name"
SEPARATORS = {"SOURCE_2_TARGET": "_2_", "SOURCE_to_TARGET": "_to_", "SOURCE___TARGET": "___"}
NAMED = 20
"""Names that a report lists before it only counts."""
OR_ALLOW = "; complete the folders, or give --allow-missing (the report then names them)"
OR_LIST = (
    "; complete the folders, name the pairs that should be there by --pairs=CSV (`generate --records` writes one), or "
)

_EXIF_TAGS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
"""Where Pillow looks for an orientation."""
_IMAGE_SUFFIX = re.compile(r"\.(png|jpe?g|jfif|webp|bmp|tiff?)$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Folder:
    """The images of a folder and its sub-folders, sorted; names are relative, with forward slashes."""

    root: pathlib.Path
    names: tuple[str, ...]

    @classmethod
    def read(cls, root: str, *, flag: str, maps: bool = False) -> Folder:
        """Of a folder that is laid out as training takes it (image/ beside parsing/ or keypoints/) the photos alone, or its
        maps. Raises InputError where there is no such folder, or no image in it."""
        path = pathlib.Path(root)
        if not path.is_dir():
            raise InputError(f"{flag}={root}: no such folder")
        path = _inside(path, maps)
        names = sorted(file.relative_to(path).as_posix() for file in files_under(path))
        if not names:
            raise InputError(f"{flag}={root}: holds no images ({', '.join(PHOTO_SUFFIXES)})")
        return cls(path, tuple(names))

    def path(self, name: str) -> pathlib.Path:
        return self.root / name

    def chosen(self, names: Sequence[str]) -> Folder:
        return dataclasses.replace(self, names=tuple(names))

    def fingerprint(self) -> str:
        """sha256 over names, sizes and times of change: another one as soon as a file changes."""
        digest = hashlib.sha256()
        for name in self.names:
            stat = self.path(name).stat()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def images(self) -> dict[str, str]:
        """{what all spellings of an image share: its name}. Raises InputError where two files are one image."""
        found: dict[str, str] = {}
        for name in self.names:
            key = image_key(name)
            if key in found:
                raise InputError(f"{self.root}: {found[key]} and {name} are the same image twice; remove one")
            found[key] = name
        return found

    def by_key(self) -> dict[str, str]:
        """The same, and by file name alone where that is unique: for names that have no folder."""
        found = self.images()
        short = collections.Counter(pathlib.PurePosixPath(name).stem for name in self.names)
        for name in self.names:
            stem = pathlib.PurePosixPath(name).stem
            if short[stem] == 1:
                found.setdefault(stem, name)
        return found

    def kinds(self) -> dict[str, dict[str, int]]:
        """{"formats": {"png": 3}} by suffix."""
        return {"formats": dict(collections.Counter(pathlib.PurePosixPath(n).suffix[1:].lower() for n in self.names))}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Names in their folders, and the rule that joined them. source: its key, where the generated name tells it."""

    generated: str
    reference: str
    rule: str
    source: str | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class Pairing:
    """unmatched: generated images without a reference. missing: what should have been generated and was not: pairs of
    the list as SOURCE > TARGET, or, without a list, reference images that no generated one names."""

    pairs: tuple[Pair, ...]
    unmatched: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def rules(self) -> dict[str, int]:
        return dict(collections.Counter(pair.rule for pair in self.pairs))

    def check(self, *, allow_missing: bool) -> None:
        """Raises InputError where there are no pairs, or where some image has no partner and that is not allowed."""
        if not self.pairs:
            shown = f"; {summarize(self.unmatched)}" if self.unmatched else ""
            raise InputError(
                f"no generated image has a reference of its name{shown}; names are TARGET or SOURCE_2_TARGET_vis"
            )
        if allow_missing:
            return
        if self.unmatched:
            raise InputError(f"{summarize(self.unmatched)} of --generated without a reference{OR_ALLOW}")
        if self.missing:
            raise InputError(f"{summarize(self.missing)} not among the generated images{OR_LIST}give --allow-missing")


def _inside(root: pathlib.Path, maps: bool) -> pathlib.Path:
    """Where the photos (or maps) of a folder of input_pipeline/sources/folder.py lie; any other folder is its own place."""
    photos = first_folder(root, PHOTO_FOLDERS)
    if photos is None or first_folder(root, (*PARSING_FOLDERS, *POSE_FOLDERS)) is None:
        return root
    return (first_folder(root, PARSING_FOLDERS) if maps else None) or photos


def image_key(name: str) -> str:
    """What all spellings of an image share, with or without a suffix."""
    return name_key(_IMAGE_SUFFIX.sub("", name.strip()) + ".png")


def summarize(names: Sequence[str]) -> str:
    """How many images, and the first of them by name."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} image{'s' if len(names) > 1 else ''} ({shown})"


def pair_folders(generated: Folder, reference: Folder, wanted: Sequence[tuple[str, str]] | None = None) -> Pairing:
    """Pairs in the order of the generated names.

    wanted: (source, target) pairs that should be there, in any spelling; others are then unmatched. Raises InputError
    where one folder holds an image twice, under any names.
    """
    bare = collections.Counter(_IMAGE_SUFFIX.sub("", name) for name in generated.names)
    if twice := [name for name, count in bare.items() if count > 1]:
        raise InputError(f"{generated.root}: {summarize(twice)} there in several formats; keep one of each")
    references = reference.by_key()
    listed = None if wanted is None else {(image_key(s), image_key(t)): f"{s} > {t}" for s, t in wanted}
    pairs, unmatched = [], []
    seen: dict[tuple[str | None, str], str] = {}
    for name in generated.names:
        rule, source, found = _partner(name, references)
        if found is None:
            unmatched.append(name)
            continue
        key = (source, found) if listed is None else _listed_key(source, image_key(found), listed)
        if key is None:
            unmatched.append(name)
            continue
        if key in seen:
            raise InputError(f"{generated.root}: {seen[key]} and {name} are {_told(key)} twice; keep one of them")
        seen[key] = name
        pairs.append(Pair(name, found, rule, source))
    if listed is None:
        shown = {found for _, found in seen}
        missing = [name for name in reference.names if name not in shown]
    else:
        missing = [text for key, text in listed.items() if key not in seen]
    return Pairing(tuple(pairs), tuple(unmatched), tuple(missing))


def _told(key: tuple[str | None, str]) -> str:
    source, target = key
    return f"{source} > {target}" if source else target


def _partner(name: str, references: Mapping[str, str]) -> tuple[str, str | None, str | None]:
    """(rule, source's key where the name tells it, reference's name); the last is None where there is none."""
    bare = _IMAGE_SUFFIX.sub("", name)
    if exact := references.get(bare):
        return SAME_NAME, None, exact
    # Before other spellings are tried: DeepFashion's rule would read TARGET alone out of SOURCE_to_TARGET.
    stem = re.sub(r"_vis$", "", bare)
    cuts: dict[str, tuple[str, str, str]] = {}
    for cut in sorted(_cuts(stem), key=lambda cut: -len(cut[2])):
        key = image_key(cut[2])
        found = references.get(key)
        if found and (key == image_key(found) or _namesakes(bare, found)):
            cuts[found] = cut  # DeepFashion's rule reads one name out of several texts: the shortest stays
    if cuts:
        found, (rule, source, _) = max(cuts.items(), key=lambda item: len(item[1][2]))
        return rule, image_key(source), found
    short = references.get(pathlib.PurePosixPath(bare).name)
    return SAME_NAME, None, references.get(image_key(name)) or (short if short and _namesakes(bare, short) else None)


def _namesakes(generated: str, reference: str) -> bool:
    """May the file name alone pair them? Where one has no folder, or both have one: anna/1 and bob/1 are two people."""
    folders = [pathlib.PurePosixPath(name).parent.as_posix() for name in (generated, reference)]
    return "." in folders or folders[0] == folders[1]


def _cuts(stem: str) -> Iterator[tuple[str, str, str]]:
    """(rule, source, target) wherever a separator stands between two names."""
    for rule, separator in SEPARATORS.items():
        for cut in range(1, len(stem) - len(separator)):
            if stem.startswith(separator, cut):
                yield rule, stem[:cut], stem[cut + len(separator) :]


def _listed_key(source: str | None, target: str, listed: Mapping[tuple[str, str], str]) -> tuple[str, str] | None:
    if source is not None:
        return (source, target) if (source, target) in listed else None
    of_target = [key for key in listed if key[1] == target]
    return of_target[0] if len(of_target) == 1 else None


def read_names(path: str) -> set[str]:
    """Keys of the images that a text file names, one a line, in any spelling. Raises InputError."""
    keys = {image_key(cells[0]) for _, cells in read_list(path) if cells[0]}
    if not keys:
        raise InputError(f"--fid-names={path}: names no image")
    return keys


def image_size(path: pathlib.Path, *, upright: bool) -> tuple[int, int]:
    """(h, w) from the file's header. Raises InputError where it is not an image, or too large.

    upright: as `read_photo` turns it; parsing maps are not turned.
    """
    with open_plain(path, "an image") as file, open_picture(file, name=str(path)) as image:
        w, h = image.size
        return (w, h) if upright and _lies(image) else (h, w)


def _lies(image: Image.Image) -> bool:
    """Is it turned by a quarter? Asks only files with a tag that tells it: to ask, Pillow decodes a PNG."""
    if not any(tag in image.info for tag in _EXIF_TAGS):
        return False
    return image.getexif().get(EXIF_ORIENTATION, 1) in range(5, 9)


def sizes(generated: Folder, reference: Folder, pairs: Sequence[Pair], *, equal: bool) -> dict[str, int]:
    """{"256x176": 3} of the generated images, from the headers, so that broken files are found before long work.

    equal: raises InputError where a pair's sizes differ, as it does for images that are none.
    """
    counts: collections.Counter[str] = collections.Counter()
    known: dict[str, str] = {}
    wrong = []
    for pair in pairs:
        size = _size_text(generated.path(pair.generated))
        if pair.reference not in known:
            known[pair.reference] = _size_text(reference.path(pair.reference))
        counts[size] += 1
        if size != known[pair.reference]:
            wrong.append(f"{pair.generated} is {size} and {pair.reference} {known[pair.reference]}")
    if wrong and equal:
        raise InputError(
            f"{len(wrong)} of {len(pairs)} pairs differ in size ({wrong[0]}); --protocol=plain resizes nothing, "
            "the others do"
        )
    return dict(counts)


def _size_text(path: pathlib.Path) -> str:
    return "x".join(map(str, image_size(path, upright=True)))
