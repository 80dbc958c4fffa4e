"""Feature transforms: what they do by hand, that absent items stay out of the fit, and what the manifest says."""

import json

import numpy as np
import pytest

from ckd_fed.cli import main
from ckd_fed.data.dataset import load_dataset
from ckd_fed.data.transforms import transform
from ckd_fed.errors import DataError

ROWS = np.random.default_rng(0).normal(3, 2, size=(40, 6)) @ np.diag([5, 3, 1, 1, 0.1, 0.1])


def test_none_center_and_z_score():
    np.testing.assert_allclose(transform(ROWS, None, "none"), ROWS, rtol=1e-6)
    np.testing.assert_allclose(transform(ROWS, None, "center"), ROWS - ROWS.mean(0), atol=1e-5)
    np.testing.assert_allclose(transform(ROWS, None, "z-score"), (ROWS - ROWS.mean(0)) / ROWS.std(0), atol=1e-5)
    constant = np.column_stack([ROWS[:, 0], np.full(40, 0.1)])
    assert (transform(constant, None, "z-score")[:, 1] == 0).all()


def test_row_norm_leaves_rows_of_zeros():
    rows = np.vstack([ROWS, np.zeros(6)])
    lengths = np.linalg.norm(transform(rows, None, "row-norm"), axis=1)
    np.testing.assert_allclose(lengths, [1] * 40 + [0], rtol=1e-6)


def test_pca_is_the_singular_value_decomposition():
    centred = ROWS - ROWS.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    got = transform(ROWS, None, "pca:3")
    np.testing.assert_allclose(np.abs(got), np.abs((u * s)[:, :3]), atol=1e-4)
    np.testing.assert_allclose(transform(ROWS, None, "pca:6") @ transform(ROWS, None, "pca:6").T, centred @ centred.T, atol=1e-2)


def test_components_that_are_rounding_are_refused(refuses):
    """They would be noise, and a z-score after them would make as much of it as of the others."""
    rng = np.random.default_rng(1)
    rows = rng.normal(3, 1, size=(200, 10)) @ rng.normal(size=(10, 32))
    for dtype in (np.float64, np.float32, np.float16):
        assert transform(rows.astype(dtype), None, "pca:10+z-score").std(0) == pytest.approx(np.ones(10), rel=1e-4)
        refuses(DataError, lambda dtype=dtype: transform(rows.astype(dtype), None, "pca:11"), "have 10 components", "1 to 10 are possible")
    assert transform((ROWS * [1, 1, 1, 1, 1, 0.01]).astype(np.float32), None, "pca:6").shape == (40, 6)  # small, but there
    refuses(DataError, lambda: transform(ROWS[:4], None, "pca:4"), "have 3 components")  # of four centred rows


def test_centred_constants_are_zero():
    assert (transform(np.full((7, 4), 0.1), None, "center+row-norm") == 0).all()


def test_items_that_lack_the_modality_are_no_part_of_the_fit():
    mask = np.arange(40) % 3 > 0
    wild = np.where(mask[:, None], ROWS, 1e9)
    for kind in ("center", "z-score", "row-norm", "pca:2", "z-score+row-norm"):
        got = transform(wild, mask, kind)
        np.testing.assert_array_equal(got[mask], transform(ROWS[mask], None, kind))
        assert (got[~mask] == 0).all()


@pytest.mark.parametrize("kind", ["centre", "pca", "pca:0", "pca:7", "pca:x", "center+", ""])
def test_what_is_refused(kind, refuses):
    refuses(DataError, lambda: transform(ROWS, None, kind))


def test_the_command(write_dataset, tmp_path, capsys):
    source = write_dataset(n_items=30)
    np.save(source / "text_mask.npy", np.arange(30) > 4)
    home = ["--home", str(tmp_path / "home")]
    main(["data", "import", str(source), "--as", "plain", *home])
    main(["data", "transform", "plain", "image=pca:2", "--as", "once", *home])
    main(["data", "transform", "once", "image=row-norm", "text=center", "--as", "twice", "--dtype", "float16", *home])
    assert "image: 2-d float16 from image_feat.npy, pca:2+row-norm, no item lacks it" in capsys.readouterr().out
    before, after = (load_dataset(tmp_path / "home" / "data" / name) for name in ("plain", "twice"))
    assert after.fingerprint == before.fingerprint
    np.testing.assert_array_equal(after.masks["text"], before.masks["text"])
    np.testing.assert_allclose(after.features["text"], transform(before.features["text"], before.masks["text"], "center"), atol=2e-3)
    np.testing.assert_allclose(after.features["image"], transform(before.features["image"], None, "pca:2+row-norm"), atol=2e-3)
    manifests = [json.loads((one.directory / "manifest.json").read_text()) for one in (before, after)]
    assert manifests[1]["sources"] == manifests[0]["sources"]
    assert manifests[1]["split"] == manifests[0]["split"]
    assert [manifests[1]["modalities"][m]["transform"] for m in ("image", "text")] == ["pca:2+row-norm", "center"]
    for arguments, mention in ((["sound=center"], "'sound'"), (["image"], "image=center"), (["image=pca:99"], "pca:99")):
        with pytest.raises(SystemExit):
            main(["data", "transform", "plain", *arguments, "--as", "x", *home])
        assert mention in capsys.readouterr().err
    assert not (tmp_path / "home" / "data" / "x").exists()
