"""Decoding: modes, sizes, orientation and damaged files."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.data import cache as data_cache
from sfumato.data import cache_root
from sfumato.errors import UserError
from sfumato.modalities.image import decode as decode_module
from sfumato.modalities.image.decode import decode
from sfumato.modalities.image.read import read_images

Folder = Callable[..., Path]
Picture = Callable[..., Image.Image]


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_modes_are_kept_bit_for_bit(folder: Folder, mode: str, picture: Picture) -> None:
    data = read_images(folder({f"{i}.png": (i, (5, 7), mode) for i in range(9)}))[0]
    expected = np.stack([np.asarray(picture(i, (5, 7), mode)).reshape(7, 5, -1) for i in range(9)])
    assert data.mode == mode and data.store.dtype == expected.dtype and (data.pixels == expected).all()


def test_native_modes_of_files(picture: Picture) -> None:
    rgb = picture(0)
    palette = rgb.quantize(8)
    transparent = palette.copy()
    transparent.info["transparency"] = 0
    cases = {
        "RGB": [encoded(rgb, "JPEG"), encoded(palette), encoded(rgb, "BMP")],
        "L": [encoded(rgb.convert("L"), "JPEG"), encoded(rgb.convert("1"))],
        "RGBA": [
            encoded(picture(0, mode="LA")),
            encoded(transparent, transparency=0),
            encoded(picture(0, mode="RGBA"), "WEBP"),
        ],
        "I;16": [encoded(picture(0, mode="I;16"), "TIFF"), encoded(picture(0, mode="I;16"))],
        "CMYK": [encoded(rgb.convert("CMYK"), "JPEG")],
    }
    for mode, payloads in cases.items():
        for payload in payloads:
            assert decode(payload)[1] == mode
    assert (decode(encoded(palette))[0] == np.asarray(palette.convert("RGB"))).all()
    assert (decode(encoded(transparent, transparency=0))[0][..., 3] == 0).any()


def test_16_bit_colour_is_not_reduced_silently() -> None:
    raw = bytearray(encoded(Image.new("RGB", (1, 1))))
    raw[24] = 16  # the bit depth in the header
    assert decode_module.native_mode(Image.new("RGB", (1, 1)), bytes(raw)) == "16-bit RGB"


def test_modes_are_converted(picture: Picture) -> None:
    deep = picture(0, mode="I;16")
    down = decode(encoded(deep), mode="L")[0][..., 0]
    assert (down == np.round(np.asarray(deep) / 257)).all()
    grey = picture(0, mode="L")
    assert (decode(encoded(grey), mode="I;16")[0][..., 0] == np.asarray(grey).astype(np.uint16) * 257).all()
    transparent = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert (decode(encoded(transparent), mode="RGB")[0] == 255).all()  # white, not the hidden red
    assert decode(encoded(picture(0).convert("CMYK"), "JPEG"), mode="RGB")[0].shape == (6, 8, 3)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
def test_resolution_crops_the_centre(mode: str, picture: Picture) -> None:
    image = picture(0, (30, 10), mode)
    pixels = decode(encoded(image), 10)[0]
    assert (pixels.squeeze() == np.asarray(image)[:, 10:20]).all()  # cropped, not resampled
    smooth = np.tile(np.linspace(0, 60000 if mode == "I;16" else 250, 40), (40, 1))
    ramp = Image.fromarray(smooth.astype(np.uint16 if mode == "I;16" else np.uint8))
    small = decode(encoded(ramp if mode == "I;16" else ramp.convert(mode)), 20)[0][..., 0]
    assert small.shape == (20, 20) and abs(int(small[10, 10]) - smooth[0, 21]) < smooth.max() / 40


def test_large_jpegs_decoded_at_low_resolution_are_close() -> None:
    ramp = np.linspace(0, 255, 640).astype(np.uint8)
    image = Image.fromarray(
        np.stack([np.tile(ramp, (640, 1)), np.tile(ramp[:, None], (1, 640)), np.full((640, 640), 99)], -1).astype(
            np.uint8
        )
    )
    fast = decode(encoded(image, "JPEG"), 32)[0].astype(int)
    slow = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(fast - slow).max() <= 4


def test_orientation_is_applied(picture: Picture) -> None:
    image = picture(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    pixels = decode(encoded(image, exif=exif))[0]
    assert (pixels == np.rot90(np.asarray(image), -1)).all()


def test_mixed_sizes_are_refused_unless_resized(folder: Folder) -> None:
    root = folder({f"{i}.png": (i, (8, 6) if i < 7 else (9, 9)) for i in range(10)})
    with pytest.raises(UserError, match=r"7 of 8x6, 3 of 9x9.*--set data.resolution=64") as error:
        read_images(root)
    assert error.value.code == 1
    assert read_images(root, resolution=4)[0].shape == (3, 4, 4)


def test_mixed_modes_are_refused_unless_converted(folder: Folder) -> None:
    root = folder({f"{i}.png": (i, (8, 6), "RGB" if i < 7 else "RGBA") for i in range(10)})
    with pytest.raises(UserError, match=r"7 RGB, 3 RGBA.*--set data.mode=RGB"):
        read_images(root)
    assert read_images(root, mode="RGB")[0].mode == "RGB"
    with pytest.raises(UserError, match=r"data\.mode 'rgb' is not one of"):
        read_images(root, mode="rgb")
    with pytest.raises(UserError, match=r"data\.resolution must be"):
        read_images(root, resolution=0)


def test_unsupported_mode_is_refused(folder: Folder, picture: Picture) -> None:
    root = folder({f"{i}.jpg": encoded(picture(i).convert("CMYK"), "JPEG") for i in range(9)})
    with pytest.raises(UserError, match=r"9 CMYK.*data.mode=RGB"):
        read_images(root)


def test_bad_files_are_named_and_counted(folder: Folder, picture: Picture) -> None:
    jpeg = encoded(picture(0, (64, 64)), "JPEG")
    png = encoded(picture(0, (64, 64)))
    bad = {"b0.png": "hello", "b1.jpg": jpeg[: len(jpeg) // 2], "b2.png": b"", "b3.png": png[: len(png) // 2]}
    floats = encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    root = folder({f"a/{i}.png": (i, (64, 64)) for i in range(6)} | bad | {"b4.tif": floats, "b5.gif": b"GIF89a"})
    with pytest.raises(UserError) as error:
        read_images(root)
    line = str(error.value)
    assert (
        error.value.code == 1 and "\n" not in line and "6 of 12 files cannot be read" in line and "--skip-bad" in line
    )
    for word in (
        "b0.png (not an image)",
        "b1.jpg (truncated)",
        "b2.png (empty)",
        "b3.png",
        "b4.tif (floating",
        "1 more",
    ):
        assert word in line
    data = read_images(root, skip_bad=True)[0]
    assert len(data) == 6 and (data.pixels == np.stack([np.asarray(picture(i, (64, 64))) for i in range(6)])).all()
    assert any("6 of 12 files left out" in note for note in data.notes)


def test_labels_stay_with_their_images_if_files_are_left_out(folder: Folder, picture: Picture) -> None:
    files: dict[str, object] = {
        f"{kind}/{i}.png": i + 10 * (kind == "dog") for kind in ("cat", "dog") for i in range(5)
    }
    data = read_images(folder(files | {"cat/2.png": "bad"}), skip_bad=True)[0]
    assert data.labels is not None and data.labels.tolist() == [0] * 4 + [1] * 5
    assert data.names is not None and data.names[2] == "cat/3.png"
    assert (data.pixels[2] == np.asarray(picture(3))).all() and (data.pixels[4] == np.asarray(picture(10))).all()


@pytest.mark.parametrize("skip", [False, True])
def test_bad_members_of_an_archive_are_named_and_counted(folder: Folder, tmp_path: Path, skip: bool) -> None:
    root = folder({f"{i}.png": i for i in range(9)})
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in root.iterdir():
            archive.write(path, path.name)
        start = archive.getinfo("4.png").header_offset + 60
    raw = bytearray((tmp_path / "a.zip").read_bytes())
    raw[start : start + 20] = bytes(20)  # breaks its checksum
    (tmp_path / "a.zip").write_bytes(raw)
    if skip:
        assert len(read_images(tmp_path / "a.zip", skip_bad=True)[0]) == 8
    else:
        with pytest.raises(UserError, match=r"1 of 9 files cannot be read as images: 4\.png .*--skip-bad"):
            read_images(tmp_path / "a.zip")


def test_a_broken_link_is_a_bad_file(folder: Folder) -> None:
    root = folder({f"{i}.png": i for i in range(9)})
    (root / "9.png").symlink_to(root / "gone.png")
    (root / "10.png").symlink_to(root / "0.png")
    with pytest.raises(UserError, match=r"1 of 11 files cannot be read as images: 9\.png"):
        read_images(root)
    assert len(read_images(root, skip_bad=True)[0]) == 10


def test_hard_links_in_a_tar_are_read(folder: Folder, tmp_path: Path) -> None:
    root = folder({f"{i}.png": i for i in range(9)})
    (root / "again.png").hardlink_to(root / "3.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(root, ".")
        assert any(member.islnk() for member in archive.getmembers())
    data = read_images(tmp_path / "a.tar")[0]
    assert data.names is not None and len(data) == 10
    assert (data.pixels[data.names.index("again.png")] == data.pixels[data.names.index("3.png")]).all()


def test_only_bad_files_are_refused(folder: Folder) -> None:
    root = folder({f"{i}.png": "hello" for i in range(9)})
    for skip in (False, True):
        with pytest.raises(UserError, match="no file can be read as an image"):
            read_images(root, skip_bad=skip)


def test_decoded_pixels_are_cached_until_a_file_changes(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, picture: Picture
) -> None:
    root = folder({f"{i}.png": (i, (5, 5), "I;16") for i in range(9)})
    monkeypatch.setattr(decode_module, "CACHE_AFTER_SECONDS", 0.0)
    first = read_images(root)[0]
    with monkeypatch.context() as patch:
        patch.setattr(decode_module, "decode", lambda *_: 1 / 0)
        again = read_images(root)[0]
    assert again.fingerprint == first.fingerprint and again.mode == "I;16"
    (old,) = (cache_root() / "decoded").iterdir()
    last_use = old.stat().st_mtime
    os.utime(old, (0, 0))
    read_images(root)
    assert old.stat().st_mtime >= last_use  # reading renews it
    os.utime(old, (0, 0))
    picture(99, (5, 5), "I;16").save(root / "0.png")
    assert read_images(root)[0].fingerprint != first.fingerprint
    assert not old.exists()  # not used for a month
    for path in (cache_root() / "decoded").iterdir():
        path.write_bytes(b"damaged")
    assert len(read_images(root)[0]) == 9


def test_large_arrays_are_mapped(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder({f"{i}.png": i for i in range(9)} | {"3.png": "bad"})
    monkeypatch.setattr(data_cache, "IN_MEMORY", 10)
    data = read_images(root, skip_bad=True)[0]
    assert isinstance(data.store, np.memmap) and len(data.batch([0, 7]).data) == 2
    monkeypatch.undo()
    assert (read_images(root, skip_bad=True)[0].pixels == data.pixels).all()


def test_a_full_disk_is_reported_when_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_cache, "IN_MEMORY", 10)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match=r"no room for .* set TMPDIR"):
        data_cache.allocate((100,), np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", None])
def test_arrays_are_cropped_and_converted(tmp_path: Path, mode: str | None) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 12, 8)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(9))
    data = read_images(tmp_path / "a.npz", resolution=8, mode=mode)[0]
    assert data.shape == (3 if mode == "RGB" else 1, 8, 8) and data.labels is not None
    assert (data.pixels[..., 0] == images[:, 2:10]).all()
