from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from momo.errors import ConfigError, DataError
from momo.eval.config import DatasetConfig
from momo.eval.datasets import LabelledDataset, open_dataset
from momo.eval.images import read_image, read_mask, resize_mask
from tests.eval.labelled import CLASSES, COUNTS, write_annotation, write_classification, write_segmentation


def opened(folder: Path, said: list[str] | None = None, **options) -> LabelledDataset:
    lines = said if said is not None else []
    dataset = open_dataset(DatasetConfig(path=str(folder), **options), report=lines.append)
    assert said is not None or not lines, lines
    return dataset


@pytest.fixture
def cls(tmp_path):
    return write_classification(tmp_path / "demo-landform_cls", size=12)


@pytest.fixture
def seg(tmp_path):
    return write_segmentation(tmp_path / "demo-crater_seg", height=12, width=14)


def refused(folder: Path, *parts: str, **options) -> None:
    with pytest.raises(DataError, match="(?s)" + ".*".join(parts)):
        opened(folder, [], **options)


def test_classification_layout(cls):
    dataset = opened(cls)
    assert dataset.name == "demo-landform_cls" and dataset.task == "classification"
    assert dataset.classes == CLASSES and dataset.synthetic is True
    assert {split: len(samples) for split, samples in dataset.splits.items()} == COUNTS
    sample = dataset.splits["train"][0]
    assert sample.key == "data/train/craters/train_001.png" and sample.label == 1


def test_segmentation_layout(seg):
    dataset = opened(seg)
    assert dataset.task == "segmentation" and dataset.classes == ["background", "crater"]
    assert dataset.synthetic is None
    assert [s.key for s in dataset.splits["val"]][:2] == ["data/val/images/000.png", "data/val/images/001.png"]
    assert {sample.stratum for sample in dataset.splits["train"]} == {1}


def test_fingerprint_is_of_names_and_bytes(seg, tmp_path):
    shutil.copytree(seg, tmp_path / "copy")
    first = opened(seg).fingerprint
    assert opened(tmp_path / "copy").fingerprint == first
    mask = tmp_path / "copy" / "data" / "test" / "masks" / "003.png"
    Image.fromarray(1 - np.array(Image.open(mask))).save(mask)
    assert opened(tmp_path / "copy").fingerprint != first


@pytest.mark.parametrize("write", [write_classification, write_segmentation])
def test_validation_folder_is_val(tmp_path, write):
    folder = write(tmp_path / "set")
    before = len(opened(folder).splits["val"])
    (folder / "data" / "val").rename(folder / "data" / "validation")
    assert len(opened(folder).splits["val"]) == before


def test_extensions_of_any_case_and_mmls_names(tmp_path):
    folder = write_segmentation(tmp_path / "mmls")
    for split in COUNTS:
        for number, image in enumerate(sorted((folder / "data" / split / "images").iterdir())):
            mask = folder / "data" / split / "masks" / image.name
            bands = np.repeat(np.array(Image.open(image))[None].astype(np.float32), 7, axis=0)
            tifffile.imwrite(image.with_name(f"Image{number}.TIF"), bands)
            Image.open(mask).save(mask.with_name(f"Mask{number}.tif"))
            image.unlink()
            mask.unlink()
    dataset = opened(folder, bands=[2, 1, 0])
    first = dataset.splits["train"][0]
    assert first.key.endswith("Image0.TIF") and first.mask.name == "Mask0.tif"
    assert read_image(first.image, bands=[2, 1, 0])[0].shape == (3, 28, 36)


def test_s5mars_pairs_jpg_with_png(seg):
    for image in (seg / "data").rglob("images/*.png"):
        Image.open(image).save(image.with_suffix(".JPG"))
        image.unlink()
    assert opened(seg).splits["test"][0].image.suffix == ".JPG"


def test_missing_folder_and_neither_layout(tmp_path):
    refused(tmp_path / "nowhere", "the dataset is not there: .*nowhere", "unzip")
    (tmp_path / "data" / "train" / "labels").mkdir(parents=True)
    refused(tmp_path, "in neither layout", "annotation.csv", "data/<split>/masks")


def test_image_without_mask_and_mask_without_image(seg):
    (seg / "data" / "train" / "masks" / "004.png").unlink()
    refused(seg, "an image has no mask: data/train/images/004.png \\(1 in train\\)", "restore the missing file")
    (seg / "data" / "train" / "images" / "004.png").unlink()
    (seg / "data" / "val" / "images" / "002.png").unlink()
    refused(seg, "a mask has no image: data/val/masks/002.png")


def test_sizes_that_differ(seg):
    Image.fromarray(np.zeros((12, 13), np.uint8)).save(seg / "data" / "test" / "masks" / "001.png")
    refused(seg, "differ in size: data/test/images/001.png is \\(12, 14\\), its mask \\(12, 13\\)")


def test_mask_values_without_class(seg):
    path = seg / "data" / "val" / "masks" / "005.png"
    mask = np.array(Image.open(path))
    Image.fromarray(mask * 255).save(path)
    refused(seg, "a mask value has no class: 255 in the mask of data/val/images/005.png", "divide the masks by 255")
    Image.fromarray(mask * 7).save(path)
    refused(seg, "a mask value has no class: 7", "classes 0..1", "correct mask or mapping")
    Image.fromarray(np.repeat(mask[..., None], 3, axis=2)).save(path)
    refused(seg, "a mask has several bands: .*005.png", "one band of class indices")


def test_classes_come_from_the_masks_without_a_mapping(seg):
    (seg / "mapping.json").unlink()
    assert opened(seg).classes == ["background", "class 1"]


def test_unreadable_image_is_named(cls, seg):
    path = cls / "data" / "test" / CLASSES[0] / "test_003.png"
    path.write_bytes(path.read_bytes()[:60])
    refused(cls, "an image cannot be read: .*test_003.png")
    path = seg / "data" / "train" / "images" / "000.png"
    path.write_bytes(b"not an image")
    refused(seg, "an image cannot be read: .*images/000.png", "whole image file")


def test_empty_split(cls, tmp_path):
    shutil.rmtree(write_segmentation(tmp_path / "seg") / "data" / "val")
    refused(tmp_path / "seg", "a split has no images: val in", "train, val and test are all needed")
    rows = [row.split(",") for row in (cls / "annotation.csv").read_text().splitlines()[1:]]
    write_annotation(cls, [row for row in rows if row[3] != "test"])
    refused(cls, "a split has no images: test in")


def test_label_without_file(cls):
    (cls / "data" / "train" / CLASSES[1] / "train_004.png").unlink()
    refused(cls, "labelled images are missing: 1, the first data/train/craters/train_004.png")


def test_files_without_label_are_counted(cls):
    image = cls / "data" / "train" / CLASSES[0] / "train_000.png"
    Image.fromarray(255 - np.array(Image.open(image))).save(image.with_name("extra.png"))
    said: list[str] = []
    opened(cls, said)
    assert len(said) == 1 and "1 images have no row in annotation.csv" in said[0] and "extra.png" in said[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["train_000.png", "dunes", 3, "train"], "a label has no class: 3 of .*classes 0..2"),
        (["train_000.png", "dunes", -1, "train"], "a label has no class: -1"),
        (["train_000.png", "dunes", "[0, 2]", "train"], "a label is not a class index: .*multi-label"),
        (["train_000.png", "dunes", 0, "dev"], "an unknown split: 'dev' in line"),
        (["train_003.png", "dunes", 0, "train"], "annotated twice: data/train/dunes/train_003.png"),
        (["../../mapping.json", "dunes", 0, "train"], "leaves the dataset folder"),
    ],
)
def test_wrong_annotation(cls, row, message):
    rows = [line.split(",") for line in (cls / "annotation.csv").read_text().splitlines()[1:]]
    write_annotation(cls, [row, *rows[1:]])
    refused(cls, message)


def test_broken_tables(cls):
    (cls / "mapping.json").write_text('{"0": "a", "2": "b"}')
    refused(cls, "the class mapping cannot be read: .*indices \\[0, 2\\]")
    (cls / "mapping.json").write_text("{")
    refused(cls, "is not JSON: .*mapping.json")
    (cls / "annotation.csv").write_text("file,label\na,0\n")
    refused(cls, "lacks a column: file_id, split in .*annotation.csv")


def test_one_class_cannot_be_learned(cls):
    rows = [line.split(",") for line in (cls / "annotation.csv").read_text().splitlines()[1:]]
    write_annotation(cls, [row for row in rows if row[1] == CLASSES[0] or row[3] != "train"])
    refused(cls, "the training images are all of one class")


def test_mapping_may_hold_aliases_or_be_a_list(cls):
    (cls / "mapping.json").write_text(json.dumps({"0": ["dunes", "dune"], "1": "craters", "2": "plains"}))
    assert opened(cls).classes == CLASSES
    (cls / "mapping.json").write_text(json.dumps(CLASSES))
    assert opened(cls).classes == CLASSES


def test_duplicates_across_splits_are_loud(cls):
    source = cls / "data" / "train" / CLASSES[0] / "train_000.png"
    for name in ("test_000.png", "test_003.png"):
        Image.open(source).save(cls / "data" / "test" / CLASSES[0] / name, compress_level=1)
    said: list[str] = []
    dataset = opened(cls, said)
    assert len(dataset.duplicates) == 2
    assert "WARNING: demo-landform_cls: 2 val or test images have the pixels of" in said[0]
    assert "test_000.png = data/train/dunes/train_000.png" in said[0]


def test_train_subset(cls):
    (cls / "few_shot").mkdir()
    header, *rows = (cls / "annotation.csv").read_text().splitlines()
    (cls / "few_shot" / "1_shot.csv").write_text("\n".join([header, *rows[:3], *rows[30:]]))
    dataset = opened(cls, train_subset="few_shot/1_shot.csv")
    assert [sample.label for sample in dataset.splits["train"]] == [1, 0, 2]
    assert len(dataset.splits["test"]) == COUNTS["test"]
    (cls / "few_shot" / "1_shot.csv").write_text(header + "\nother.png,dunes,0,train\n")
    refused(cls, "names no training image: .*1_shot.csv", train_subset="few_shot/1_shot.csv")
    refused(cls, "a table of the dataset cannot be read: .*2_shot.csv", train_subset="few_shot/2_shot.csv")


def test_images_of_every_kind(tmp_path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 1000).save(tmp_path / "deep.png")
    Image.fromarray(np.stack([grey, grey, grey, (grey > 5).astype(np.uint8) * 255], -1)).save(tmp_path / "alpha.png")
    floating = grey.astype(np.float32)
    floating[0, 0] = np.nan
    Image.fromarray(floating).save(tmp_path / "float.tif")
    assert (read_image(tmp_path / "grey.png")[0] == grey[None]).all()
    assert read_image(tmp_path / "deep.png")[0].max() == 11000
    value, valid = read_image(tmp_path / "alpha.png")
    assert value.shape == (3, 3, 4) and (valid == (grey > 5)).all() and (value[:, ~valid] == 0).all()
    value, valid = read_image(tmp_path / "float.tif")
    assert not valid[0, 0] and valid.sum() == 11 and value[0, 0, 0] == 0
    tifffile.imwrite(tmp_path / "seven.tif", np.zeros((7, 20, 20), np.float32))
    with pytest.raises(DataError, match=r"not clear which bands.*\(20, 20, 7\).*bands of the dataset"):
        read_image(tmp_path / "seven.tif")
    with pytest.raises(DataError, match="fewer bands than asked for: .*grey.png: 1 bands"):
        read_image(tmp_path / "grey.png", bands=[3])
    with pytest.raises(DataError, match="an image cannot be read: .*nothing.png"):
        read_image(tmp_path / "nothing.png")


def test_masks_of_every_kind(tmp_path):
    index = np.array([[0, 1], [2, 0]], dtype=np.uint8)
    palette = Image.new("P", (2, 2))
    palette.putdata(index.ravel().tolist())
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png")
    assert (read_mask(tmp_path / "palette.png") == index).all()
    Image.fromarray(index > 0).save(tmp_path / "bool.png")
    assert (read_mask(tmp_path / "bool.png") == (index > 0)).all()
    tifffile.imwrite(tmp_path / "deep.tif", np.array([[0, 300]], dtype=np.uint16))
    with pytest.raises(DataError, match=r"no class indices: .*deep.tif: 0..300"):
        read_mask(tmp_path / "deep.tif")


def test_mask_resize_keeps_indices():
    mask = np.zeros((9, 9), dtype=np.uint8)
    mask[3:6, 3:6] = 4
    small = resize_mask(mask, 3)
    assert small.tolist() == [[0, 0, 0], [0, 4, 0], [0, 0, 0]]


def test_dataset_options_are_checked():
    with pytest.raises(ConfigError, match="datasets.bands is out of range"):
        DatasetConfig(path="x", bands=[0, 1])
    with pytest.raises(ConfigError, match="datasets.name cannot be part of a file name: 'a/b'"):
        DatasetConfig(path="x", name="a/b")
