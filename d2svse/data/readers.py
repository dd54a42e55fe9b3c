"""Read the usual data layouts of image-text retrieval as the records of a manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from d2svse.choices import DataFormat
from d2svse.data.layout import as_id, as_one_line, find_image_folder, read_json, read_lines
from d2svse.data.manifest import (
    ManifestError,
    RealNames,
    Record,
    as_caption,
    as_captions,
    dense_text,
    join_dense,
    manifest_errors,
    read_json_lines,
    read_manifest,
)
from d2svse.data.shards import INDEX_FILE, is_url, read_shards
from d2svse.data.tables import TABLE_NAMES, find_table, read_table
from d2svse.files.replace import written_aside
from d2svse.images import StoredImage
from d2svse.images.regions import SUFFIX, RegionImage, region_images

FORMATS = get_args(DataFormat)
FORMATS_WITH_COLUMNS = ("manifest", "table", "datasets")
FORMATS_OF_RELATIVE_NAMES = ("published", "karpathy", "coco")  # these name files in the folder of images
FORMATS_OF_OWN_IMAGES = ("shards", "regions")  # these hold what they name
DENSE_SUFFIXES = {"long": "", "short200": "_short200"}


def read_records(
    source: str | os.PathLike[str],
    format: str = "auto",
    *,
    split: str | None = None,
    image_folder: str | os.PathLike[str] | None = None,
    dense: str | os.PathLike[str] | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    allow_missing: bool = False,
) -> list[Record]:
    """Read images and captions of any known layout.

    Args:
        source: a manifest; a folder of the published layout; Karpathy's or COCO's JSON; a table
            of images and captions, or its folder; a `datasets` folder or Hub id; the
            index of WebDataset shards, `shards.jsonl`, its folder or its URL; a file of region features,
            `{split}_ims.npy`.
        format: "manifest", "published", "karpathy", "coco", "table", "datasets", "shards" or
            "regions"; "auto" detects it.
        split: the split to read, for a layout with several; "train+restval" joins two of Karpathy's.
        image_folder: folder that relative image paths start from; None for the layout's usual folder. Shards and region
            files take none.
        dense: source of the dense captions, see `join_dense`; for the published layout also "long" or
            "short200". None keeps those of the layout ("long" for the published one).
        image_column: column of the images in a table or a `datasets` dataset, or field of a manifest;
            None for the layout's usual one.
        caption_column: column or field of the captions; None for the layout's usual one.
        allow_missing: accept rows of a manifest whose image file is missing; other layouts are not checked.

    Raises:
        ManifestError: if the files do not fit the layout; the message names the file.
        ValueError: if the format is unknown, the layout needs a split, or an option does not concern it.
    """
    if format == "auto":
        format = detect_format(source)
    if format not in FORMATS:
        raise ValueError(f"unknown data format {format!r}; expected auto, {', '.join(FORMATS)}")
    has_splits = format in ("published", "karpathy")
    if has_splits and split is None:
        known = _published_splits(Path(source)) if format == "published" else []
        listed = f": {', '.join(known)}" if known else ""
        raise ValueError(f"{os.fspath(source)}: a {format} layout has several splits; name one (--split){listed}")
    if not has_splits and format != "datasets" and split is not None:
        raise ValueError(f"{os.fspath(source)}: a {format} source has no splits; leave out the split {split!r}")
    published_dense = str(dense) if dense in DENSE_SUFFIXES else None
    if published_dense and format not in ("published", "regions"):
        raise ValueError(
            f"{os.fspath(source)}: only the published layout has the dense captions {dense!r}, not {format}"
        )
    given = {"image_column": image_column, "caption_column": caption_column}
    columns = {name: column for name, column in given.items() if column is not None}
    if columns and format not in FORMATS_WITH_COLUMNS:
        option = "--" + next(iter(columns)).replace("_", "-")
        raise ValueError(f"{os.fspath(source)}: a {format} source has no columns to choose from; leave out {option}")
    if image_folder is not None and format in FORMATS_OF_OWN_IMAGES:
        kind = "shards hold their images" if format == "shards" else "region files hold features instead of images"
        raise ValueError(f"{os.fspath(source)}: {kind}; leave out the image_folder {image_folder} (--image-folder)")
    path = Path(source)
    if format == "manifest":
        records = read_manifest(source, image_folder, allow_missing=allow_missing, **columns)
    elif format == "datasets":
        records = read_datasets(os.fspath(source), split, image_folder=image_folder, **columns)
    elif format == "published":
        records = read_published(path, str(split), image_folder=image_folder, dense=published_dense)
    elif format == "regions":
        records = read_regions(path, dense=published_dense)
    elif format == "shards":
        records = read_shards(source)
    elif format == "karpathy":
        records = read_karpathy(path, str(split), image_folder=image_folder)
    elif format == "coco":
        records = read_coco(path, image_folder=image_folder)
    else:
        records = read_table(path, image_folder=image_folder, **columns)
    seen: set[str | StoredImage] = set()
    real_name = RealNames()
    for record in records if format != "manifest" else []:  # whose lines are compared already
        image = real_name(record.image) if isinstance(record.image, Path) else record.image
        if image in seen:
            raise ManifestError(f"{record.where(source)}: {record.image} belongs to two images; expected one")
        seen.add(image)
    if dense is None or published_dense:
        return records
    return join_dense(records, dense, dense_folder(source, image_folder), source)


def detect_format(source: str | os.PathLike[str]) -> str:
    """Return the layout of a file or folder.

    Raises:
        ManifestError: if it does not exist or its layout is unknown.
    """
    if is_url(source) or Path(source).name == INDEX_FILE or (Path(source) / INDEX_FILE).is_file():
        return "shards"  # the only layout that is read over http
    path = Path(source)
    if path.is_dir():
        if any(path.glob("*_ids.txt")):
            return "published"
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            return "datasets"
        if find_table(path) is not None:
            return "table"
        looked = f"*_ids.txt (published), dataset_info.json (datasets), {', '.join(TABLE_NAMES)} (table)"
        raise ManifestError(f"{path}: unknown data layout; looked for {looked}")
    if not path.is_file():
        raise ManifestError(f"{path}: no such file or folder")
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return "regions"
    if suffix == ".json":
        content = read_json(path)
        if isinstance(content, list):
            return "table"
        if isinstance(content, dict) and "annotations" in content:
            return "coco"
        if isinstance(content, dict) and "images" in content:
            return "karpathy"
        raise ManifestError(
            f'{path}: expected "images" with sentences (Karpathy) or with "annotations" (COCO), or a list of rows'
        )
    return "table" if suffix in (".csv", ".txt", ".token", ".tsv") else "manifest"


def read_published(
    folder: str | os.PathLike[str],
    split: str,
    *,
    image_folder: str | os.PathLike[str] | None = None,
    dense: str | None = None,
) -> list[Record]:
    """Read the layout of the published code (D2S-VSE, and before it VSE++ and others).

    The folder holds these files:

    - `{split}_caps.txt`: one caption on each line.
    - `{split}_ids.txt`: the id of each caption's image; or one id for each image, if all images have
      equally many captions in a row.
    - `id_mapping.json`: the file name of each id's image.
    - `{dataset}_{split}.jsonl` and `{dataset}_{split}_short200.jsonl`: the dense caption of the k-th image
      on line k.

    Args:
        folder: the folder of these files.
        split: the split to read.
        image_folder: folder of the images; None for the usual one in `folder`.
        dense: "long" or "short200" for these dense captions, which must exist; None for "long", if it exists.

    Raises:
        ManifestError: if a file is missing or counts do not match.
    """
    folder = Path(folder)
    if not (folder / f"{split}_caps.txt").is_file():
        known = _published_splits(folder)
        meant = f"; did you mean {', '.join(known)}?" if known else ""
        raise ManifestError(f"{folder / f'{split}_caps.txt'}: no such file{meant}")
    captions = read_lines(folder / f"{split}_caps.txt")
    ids = read_lines(folder / f"{split}_ids.txt")
    names = read_json(folder / "id_mapping.json")
    if len(captions) == len(ids):
        owners = ids
    elif ids and len(captions) % len(ids) == 0:
        if len(set(ids)) < len(ids):
            raise ManifestError(
                f"{folder}: {split}_ids.txt has {len(ids)} ids but {len(set(ids))} different ones; expected each once"
            )
        owners = [image for image in ids for _ in range(len(captions) // len(ids))]
    else:
        raise ManifestError(
            f"{folder}: {len(captions)} captions in {split}_caps.txt and {len(ids)} ids in {split}_ids.txt; "
            "expected an id for each caption, or for each image with equally many captions"
        )
    grouped: dict[str, list[str]] = {}
    lines: dict[str, int] = {}
    for line, (image, caption) in enumerate(zip(owners, captions, strict=True), start=1):
        if not isinstance(names, dict) or not isinstance(names.get(image), str):
            raise ManifestError(f"{folder}: id_mapping.json has no file name for the id {image} of {split}_ids.txt")
        grouped.setdefault(image, []).append(as_caption(caption, f"{folder / f'{split}_caps.txt'}:{line}"))
        lines.setdefault(image, line)
    texts = _published_dense(folder, split, len(grouped), dense)
    root = find_image_folder(folder, image_folder)
    return [
        Record(root / names[image], tuple(own), text, lines[image], file=str(folder / f"{split}_caps.txt"))
        for (image, own), text in zip(grouped.items(), texts, strict=True)
    ]


def read_regions(path: str | os.PathLike[str], *, dense: str | None = None) -> list[Record]:
    """Read a file of region features, `{split}_ims.npy (n_images, n_regions, width)`, with the captions beside it.

    The captions are those of the published layout, see `read_published`: `{split}_caps.txt`, and optionally
    `{split}_ids.txt`, with an id for each caption or each image, and `{dataset}_{split}.jsonl`. Without an id for each
    caption, all images have equally many captions in a row.

    Args:
        path: the file.
        dense: "long" or "short200" for these dense captions, which must exist; None for "long", if it exists.

    Raises:
        ManifestError: if a file is missing or counts do not match.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIX):
        raise ManifestError(f"{path}: expected a name that ends with {SUFFIX}, such as train{SUFFIX}")
    with manifest_errors():
        images: list[RegionImage] = region_images(path)
    folder, split = path.parent, path.name.removesuffix(SUFFIX)
    source = folder / f"{split}_caps.txt"
    captions = read_lines(source)
    listed = folder / f"{split}_ids.txt"
    ids = read_lines(listed) if listed.is_file() else None
    of_images = ids is None or len(ids) == len(set(ids)) == len(images)  # then captions stand in equal groups
    grouped: list[list[str]] = [[] for _ in images]
    if ids is not None and len(ids) == len(captions) and len(set(ids)) == len(images):
        row_of = {image: row for row, image in enumerate(dict.fromkeys(ids))}
        owners = [row_of[image] for image in ids]
    elif of_images and captions and len(captions) % len(images) == 0:
        each = len(captions) // len(images)
        owners = [row for row in range(len(images)) for _ in range(each)]
    else:
        found = f"{len(images)} images and {len(captions)} captions in {source.name}"
        if ids is not None:
            found += f", and {len(ids)} ids of {len(set(ids))} images in {listed.name}"
        raise ManifestError(f"{path}: {found}; expected an id for each caption, or for each image")
    for line, (owner, caption) in enumerate(zip(owners, captions, strict=True), start=1):
        grouped[owner].append(as_caption(caption, f"{source}:{line}"))
    texts = _published_dense(folder, split, len(images), dense)
    return [Record(image, tuple(own), text) for image, own, text in zip(images, grouped, texts, strict=True)]


def read_karpathy(
    path: str | os.PathLike[str], split: str, *, image_folder: str | os.PathLike[str] | None = None
) -> list[Record]:
    """Read Karpathy's `dataset_flickr8k.json`, `dataset_flickr30k.json` or `dataset_coco.json`.

    Args:
        path: the file.
        split: "train", "val", "test" or "restval", or several joined by "+".
        image_folder: folder of the images; None for the usual one beside the file.

    Raises:
        ManifestError: if the file does not fit the layout or lacks the split.
    """
    path, wanted = Path(path), set(split.split("+"))
    root = find_image_folder(path.parent, image_folder)
    records: list[Record] = []
    seen: set[str] = set()
    for row, image in enumerate(_items(path, "images"), start=1):
        where = f"{path}: image {row}"
        name, part, sentences = image.get("filename"), image.get("split"), image.get("sentences")
        if not isinstance(part, str):
            raise ManifestError(f'{where}: expected "split" with a name, got {part!r:.80}')
        seen.add(part)
        if part not in wanted:
            continue
        part_of_path = image.get("filepath", "")
        well_formed = isinstance(name, str) and name and isinstance(part_of_path, str) and isinstance(sentences, list)
        if not well_formed or not sentences or not all(isinstance(sentence, dict) for sentence in sentences):
            raise ManifestError(f'{where}: expected "filename" with a name and "sentences" with a list of objects')
        expected = image.get("sentids", sentences)
        if not isinstance(expected, list):
            raise ManifestError(f'{where} ({name}): expected "sentids" with a list, got {expected!r:.80}')
        if len(expected) != len(sentences):
            raise ManifestError(
                f"{where} ({name}): {len(sentences)} sentences and {len(expected)} sentids; expected equally many"
            )
        captions = tuple(as_one_line(sentence.get("raw"), f"{where} ({name})") for sentence in sentences)
        records.append(Record(root / part_of_path / name, captions))
    missing = wanted - seen
    if missing:
        raise ManifestError(
            f"{path}: no split {', '.join(sorted(missing))}; the splits are {', '.join(sorted(seen)) or 'none'}"
        )
    return records


def read_coco(path: str | os.PathLike[str], *, image_folder: str | os.PathLike[str] | None = None) -> list[Record]:
    """Read COCO's `captions_*.json`.

    Raises:
        ManifestError: if a caption has no image or an image has no caption.
    """
    path = Path(path)
    root = find_image_folder(path.parent, image_folder)
    names: dict[str, str] = {}
    for row, image in enumerate(_items(path, "images"), start=1):
        key, name = as_id(image.get("id")), image.get("file_name")
        if key is None or not isinstance(name, str) or not name or key in names:
            raise ManifestError(f'{path}: image {row}: expected "file_name" and an "id" of its own, got {image!r:.200}')
        names[key] = name
    captions: dict[str, list[str]] = {image: [] for image in names}
    for row, annotation in enumerate(_items(path, "annotations"), start=1):
        owner = as_id(annotation.get("image_id"))
        if owner is None or owner not in captions:
            found = annotation.get("image_id")
            raise ManifestError(f"{path}: annotation {row} is of image {found!r:.80}, which is not in the images")
        captions[owner].append(as_one_line(annotation.get("caption"), f"{path}: annotation {row}"))
    bare = [image for image, own in captions.items() if not own]
    if bare:
        raise ManifestError(
            f"{path}: {len(bare)} of {len(names)} images have no caption; the first is {names[bare[0]]}"
        )
    return [Record(root / names[image], tuple(own)) for image, own in captions.items()]


def read_datasets(
    source: Any,
    split: str | None = None,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    image_folder: str | os.PathLike[str] | None = None,
) -> list[Record]:
    """Read a Hugging Face `datasets` dataset; a row is an image or a pair, and rows of one image are joined.

    Images that the dataset stores as bytes are written once to `image_folder`, under the hash of their
    content.

    Args:
        source: a loaded dataset, a folder that `save_to_disk` wrote, or a Hub id.
        split: the split to read, for a dataset with several; a dataset of one split takes the name of that one.
        image_column: the column of images.
        caption_column: the column of captions, one or a list in each row.
        image_folder: folder to write the images to that are stored as bytes.

    Raises:
        ImportError: if `datasets` is not installed.
        ManifestError: if the split or a column is missing or a caption is empty.
        ValueError: if images must be written and `image_folder` is None.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError('reading a datasets dataset needs the extra [data]: run pip install "d2svse[data]"') from None
    if isinstance(source, str):
        where = source
        saved = any((Path(source) / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
        try:
            source = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
        except Exception as error:  # datasets raises errors of many kinds for a broken folder
            raise ManifestError(f"{where}: datasets cannot read it ({type(error).__name__}: {error})") from error
    else:
        where = type(source).__name__
    if isinstance(source, dict):
        if split not in source:
            raise ManifestError(f"{where}: no split {split!r}; the splits are {', '.join(source)}; name one (--split)")
        source = source[split]
    elif split is not None and str(source.split) != split:
        own = "no splits" if source.split is None else f"the split {source.split} alone"
        raise ManifestError(f"{where}: has {own}; leave out the split {split!r} (--split)")
    for column in (image_column, caption_column):
        if column not in source.column_names:
            raise ManifestError(f"{where}: no column {column!r}; the columns are {', '.join(source.column_names)}")
    try:
        source = source.cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ManifestError(f"{where}: column {image_column!r} holds no images ({error})") from None
    captions_of: dict[Path, list[str]] = {}
    for row, item in enumerate(source):
        held = item[caption_column]
        at = f"{where}: row {row}"
        captions = [as_one_line(caption, at) for caption in as_captions(held, at, caption_column)]
        image = item[image_column] or {"bytes": None, "path": None}
        if image["bytes"] is None and image["path"]:
            path = Path(image["path"])
        else:
            path = _write_image(image["bytes"], row, image_folder, where)
        captions_of.setdefault(path, []).extend(captions)
    return [Record(path, tuple(captions)) for path, captions in captions_of.items()]


def shared_folders(
    sources: Sequence[str | os.PathLike[str]], image_folder: str | os.PathLike[str] | None, format: str = "auto"
) -> list[str | os.PathLike[str] | None]:
    """Return the folder of images for each of several sources that one option names it for.

    Shards and region files get None beside a source that has use for the folder; else it is left to be refused.

    Args:
        sources: the sources.
        image_folder: the given folder, or None.
        format: the format of the first source.

    Raises:
        ManifestError: if a source does not exist or its layout is unknown.
    """
    if image_folder is None:
        return [None] * len(sources)
    formats = [detect_format(one) if number or format == "auto" else format for number, one in enumerate(sources)]
    own = [layout in FORMATS_OF_OWN_IMAGES for layout in formats]
    return [None if one and not all(own) else image_folder for one in own]


def dense_folder(source: str | os.PathLike[str], image_folder: str | os.PathLike[str] | None) -> Path:
    """Return the folder that image paths of a dense JSONL start from: `image_folder`, or the source's own."""
    if image_folder is not None:
        return Path(image_folder)
    return Path(source) if Path(source).is_dir() else Path(source).parent


def require_images(records: Sequence[Record], source: str | os.PathLike[str]) -> None:
    """Check that every image file exists.

    Raises:
        ManifestError: if one is missing; the message counts the missing images and names the first.
    """
    paths = [record.image for record in records if not isinstance(record.image, StoredImage)]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ManifestError(
            f"{os.fspath(source)}: {len(missing)} of {len(records)} images are missing, the first is {missing[0]}; "
            "name their folder with image_folder (--image-folder)"
        )


def refuse_links(
    records: Sequence[Record],
    source: str | os.PathLike[str],
    format: str,
    image_folder: str | os.PathLike[str] | None = None,
) -> None:
    """Check that no image leaves the data set's folder by a link, before images are packed.

    The folder is `image_folder`, or the source's own. Only a manifest and a table may name images outside of it,
    by a path.

    Raises:
        ManifestError: if an image leaves the folder; the message names the first.
    """
    base = dense_folder(source, image_folder)
    real_base = Path(os.path.realpath(base))
    for record in records:
        if isinstance(record.image, StoredImage):
            continue
        named = Path(os.path.abspath(record.image))
        if format not in FORMATS_OF_RELATIVE_NAMES and not named.is_relative_to(os.path.abspath(base)):
            continue
        if not Path(os.path.realpath(record.image)).is_relative_to(real_base):
            raise ManifestError(
                f"{record.where(source)}: {record.image} leaves the folder {base}, by a link or by its name; "
                "copy the image there, or name the folder of the images (--image-folder)"
            )


def _published_splits(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix("_caps.txt") for path in folder.glob("*_caps.txt"))


def _write_image(content: bytes | None, row: int, folder: str | os.PathLike[str] | None, where: str) -> Path:
    if not content:
        raise ManifestError(f"{where}: row {row} has no image")
    if folder is None:
        raise ValueError(
            f"{where}: its images are not files; name a folder for them with image_folder (--image-folder)"
        )
    suffix = ".png" if content.startswith(b"\x89PNG") else ".jpg"
    image = Path(folder) / f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}"  # one name, one content
    if not image.is_file():
        with written_aside(image) as aside:
            aside.write_bytes(content)
    return image


def _published_dense(folder: Path, split: str, count: int, dense: str | None) -> list[str | None]:
    if dense not in (None, *DENSE_SUFFIXES):
        raise ValueError(f"dense captions of the published layout must be {' or '.join(DENSE_SUFFIXES)}, got {dense!r}")
    suffix = DENSE_SUFFIXES[dense or "long"]
    files = sorted(folder.glob(f"*_{split}{suffix}.jsonl"))
    if len(files) > 1:
        raise ManifestError(f"{folder}: several dense files: {', '.join(file.name for file in files)}; keep one")
    if not files:
        if dense is not None:
            raise ManifestError(f"{folder}: no dense file DATASET_{split}{suffix}.jsonl")
        return [None] * count
    rows = list(read_json_lines(files[0]))
    if len(rows) != count:
        raise ManifestError(f"{files[0]}: {len(rows)} dense captions for {count} images; expected one for each")
    return [dense_text(files[0], line, row).strip() for line, row in rows]


def _items(path: Path, key: str) -> list[dict[str, Any]]:
    content = read_json(path)
    items = content.get(key) if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise ManifestError(f'{path}: expected "{key}" with a list of objects')
    for row, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise ManifestError(f"{path}: {key.removesuffix('s')} {row}: expected an object, got {item!r:.80}")
    return items
