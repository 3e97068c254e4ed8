import io

import numpy as np
import pytest
from data_sets import Image, encoded, noise

from sparsetwin.data._decoding import cached, content_key, decode, open_rgb
from sparsetwin.data._shards import Part
from sparsetwin.errors import DataError

PIXELS = noise(600, seed=5)


def part(images, *, origin="shard.parquet"):
    return Part(origin, images, np.zeros(len(images), dtype=np.int64))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_decoding_returns_every_pixel_in_order(kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    images = [encoded(pixels, kind=kind, **options) for pixels in PIXELS[:300]]
    decoded = decode([part(images[:7]), part(images[7:])], side=32)
    assert np.array_equal(decoded, PIXELS[:300].transpose(0, 3, 1, 2))
    assert decoded.flags.c_contiguous


def test_a_grey_image_becomes_three_equal_channels():
    decoded = decode([part([encoded(PIXELS[0, :, :, 0])])], side=32)
    assert np.array_equal(decoded, np.broadcast_to(PIXELS[0, :, :, 0], (1, 3, 32, 32)))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 99])
def test_a_damaged_image_is_named_by_file_and_row(damage):
    images = [encoded(pixels) for pixels in PIXELS[:300]]
    images[270] = damage(images[270])
    with pytest.raises(DataError, match=r"row 270 of b.parquet holds no whole image"):
        decode([part(images[:3], origin="a.parquet"), part(images, origin="b.parquet")], side=32)


def test_an_image_of_another_size_is_named():
    with pytest.raises(DataError, match=r"row 0 of shard.parquet is an image of 16x32 pixels; expected 32x32"):
        decode([part([encoded(PIXELS[0, :16])])], side=32)


def test_the_key_changes_with_every_image_their_order_and_their_borders():
    keys = {content_key([part(images)]) for images in ([b"ab", b"c"], [b"c", b"ab"], [b"a", b"bc"], [b"ab", b"d"], [])}
    assert len(keys) == 5


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_images_of_every_format_and_mode_become_rgb(kind, mode):
    if (kind, mode) in {("PNG", "CMYK"), ("JPEG", "RGBA"), ("JPEG", "P")}:
        pytest.skip("there is no such file")
    file = io.BytesIO()
    Image.fromarray(PIXELS[0]).convert(mode).save(file, kind)
    opened = open_rgb(file.getvalue())
    assert (opened.mode, opened.size) == ("RGB", (32, 32))


def refuse():
    raise AssertionError("made although it was cached")


def test_what_was_made_once_is_read_from_the_cache(tmp_path):
    folder = tmp_path / "new" / "cache"
    assert np.array_equal(cached(folder, "key", lambda: PIXELS), PIXELS)
    assert np.array_equal(cached(folder, "key", refuse), PIXELS)
    assert [path.name for path in folder.iterdir()] == ["images-key.npz"]


def test_the_cache_is_by_default_where_the_user_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cached(None, "key", lambda: PIXELS[:1])
    assert (tmp_path / "xdg" / "sparsetwin" / "images-key.npz").exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cached(None, "key", lambda: PIXELS[:1])
    assert (tmp_path / "home" / ".cache" / "sparsetwin" / "images-key.npz").exists()


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "foreign"])
def test_a_corrupted_cache_is_made_again_with_a_warning(tmp_path, damage):
    cached(tmp_path, "key", lambda: PIXELS)
    path = tmp_path / "images-key.npz"
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    if damage == "foreign":
        np.savez(path, other=PIXELS[:1])
    else:
        path.write_bytes({"empty": b"", "truncated": bytes(data[:-100]), "flipped": bytes(data)}[damage])
    with pytest.warns(UserWarning, match="images-key.npz is corrupted"):
        assert np.array_equal(cached(tmp_path, "key", lambda: PIXELS), PIXELS)
    assert np.array_equal(cached(tmp_path, "key", refuse), PIXELS)


def test_a_cache_that_cannot_be_written_gives_one_warning_and_the_images(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be kept in") as warned:
        assert np.array_equal(cached(tmp_path / "file", "key", lambda: PIXELS), PIXELS)
    assert len(warned) == 1


def test_a_write_that_stops_leaves_no_file(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "key", lambda: PIXELS)
    assert list(tmp_path.iterdir()) == []
