"""Images with captions written by people: COCO, Flickr30K, NoCaps, Visual Genome."""

from __future__ import annotations

from collections.abc import Iterator

from blipfast.data.prepare.source import (
    DataSet,
    Item,
    Source,
    Split,
    by_image,
    key_of,
    part_of,
    rows_of,
    texts,
)
from blipfast.errors import DataError


def _karpathy(source: Source, split: str, name: str, folder: str) -> Iterator[Item]:
    """Karpathy's `dataset_<name>.json`; COCO's `restval` belongs to its training part."""
    path = source.find(f"dataset_{name}.json")
    rows = rows_of(path, part_of(path, source.json(path), "images"), "filename", "split")
    parts = {"train", "restval"} if split == "train" else {split}
    for row in rows:
        if row["split"] not in parts:
            continue
        sentences = [s["raw"] for s in rows_of(path, row.get("sentences"), "raw")]
        place = f"{row.get('filepath', folder)}/{row['filename']}"
        image = row.get("cocoid", row.get("imgid", row["filename"]))
        yield Item(
            key_of(place), source.folder / place, texts("human", *sentences), {"image": image}
        )


def _karpathy_list(source: Source, split: str, name: str) -> Iterator[Item]:
    """The lists that BLIP's users have: one caption a row in training, all of an image else."""
    path = source.find(f"{name}_{split}.json")
    rows = rows_of(path, source.json(path), "image", "caption")
    pairs = [
        (row["image"], caption)
        for row in rows
        for caption in ([row["caption"]] if isinstance(row["caption"], str) else row["caption"])
    ]
    for place, captions in by_image(pairs).items():
        digits = "".join(c for c in place.rpartition("_")[2] if c.isdigit())
        image = int(digits) if digits else place
        yield Item(
            key_of(place), source.folder / place, texts("human", *captions), {"image": image}
        )


def _coco(source: Source, split: str) -> Iterator[Item]:
    if source.has("dataset_coco.json"):
        return _karpathy(source, split, "coco", "")
    return _karpathy_list(source, split, "coco_karpathy")


def _flickr(source: Source, split: str) -> Iterator[Item]:
    if source.has("dataset_flickr30k.json"):
        return _karpathy(source, split, "flickr30k", "flickr30k-images")
    return _karpathy_list(source, split, "flickr30k")


def _nocaps(source: Source, split: str) -> Iterator[Item]:
    names = {"val": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}
    path = source.find(names[split])
    content = source.json(path)
    captions: dict[int, list[str]] = {}
    if split == "val":
        annotations = part_of(path, content, "annotations")
        for row in rows_of(path, annotations, "image_id", "caption"):
            captions.setdefault(row["image_id"], []).append(row["caption"])
    for row in rows_of(path, part_of(path, content, "images"), "id", "file_name"):
        ids = {"image": row["id"]}
        if "domain" in row:
            ids["domain"] = row["domain"]
        found = captions.get(row["id"], [])
        if split == "val" and not found:
            raise DataError(f"{path}: image {row['id']} has no caption")
        # A record has a text at least: the test part has none to give.
        entries = texts("human", *found) if found else texts("withheld", "")
        yield Item(key_of(row["file_name"]), source.folder / split / row["file_name"], entries, ids)


def _genome(source: Source, split: str) -> Iterator[Item]:
    """A list of image and caption as used in pre-training, or the published regions."""
    if source.has("vg_caption.json"):
        path = source.find("vg_caption.json")
        rows = rows_of(path, source.json(path), "image", "caption")
        found = by_image((row["image"], row["caption"]) for row in rows)
    else:
        path = source.find("region_descriptions.json")
        found = {}
        for row in rows_of(path, source.json(path), "id", "regions"):
            name = f"{row['id']}.jpg"
            folder = next((f for f in ("VG_100K", "VG_100K_2") if source.has(f"{f}/{name}")), None)
            phrases = [r["phrase"] for r in rows_of(path, row["regions"], "phrase")]
            if phrases:
                found[f"{folder or 'VG_100K'}/{name}"] = phrases
    for place, captions in found.items():
        digits = place.rpartition("/")[2].partition(".")[0]
        image = int(digits) if digits.isdigit() else place
        yield Item(
            key_of(place), source.folder / place, texts("human", *captions), {"image": image}
        )


SETS = (
    DataSet(
        "coco",
        "  dataset_coco.json (Karpathy's splits) or coco_karpathy_{train,val,test}.json (BLIP's)\n"
        "  train2014/, val2014/ (COCO 2014 images)",
        {
            "train": Split(113_287, 566_747),
            "val": Split(5_000, 25_010),
            "test": Split(5_000, 25_010),
        },
        _coco,
    ),
    DataSet(
        "flickr30k",
        "  dataset_flickr30k.json (Karpathy's splits) or flickr30k_{train,val,test}.json (BLIP's)\n"
        "  flickr30k-images/ (Flickr30K, University of Illinois)",
        {
            "train": Split(29_000, 145_000),
            "val": Split(1_014, 5_070),
            "test": Split(1_000, 5_000),
        },
        _flickr,
    ),
    DataSet(
        "nocaps",
        "  nocaps_val_4500_captions.json, nocaps_test_image_info.json (NoCaps)\n"
        "  val/, test/ (images by their file_name, from Open Images)",
        {"val": Split(4_500, 45_000), "test": Split(10_600)},
        _nocaps,
    ),
    DataSet(
        "vg",
        "  vg_caption.json (image and caption, as in pre-training) or region_descriptions.json\n"
        "  VG_100K/, VG_100K_2/ (Visual Genome images)",
        {"train": Split()},
        _genome,
    ),
)
