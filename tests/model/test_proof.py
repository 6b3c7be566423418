"""Logits of a merged export beside those of base and adapter."""

import numpy as np
import pytest
from parity import LORA, adapter_of, logits
from tiny import write_model

from kithara_ray.errors import ConfigError, ExportError
from kithara_ray.hf.adapter import Adapter
from kithara_ray.hf.checkpoint import BaseCheckpoint
from kithara_ray.hf.exports.export import Layout, export_with_report
from kithara_ray.hf.exports.options import ExportOptions
from kithara_ray.model.causal_lm import build
from kithara_ray.model.proof import prove_logits
from kithara_ray.sharding.mesh import make_mesh


@pytest.fixture(scope="module")
def given(tiny_models):
    base = BaseCheckpoint.open(tiny_models["gemma2"])
    tensors = adapter_of(build(base.config, LORA["gemma2"], make_mesh(), "float32"))
    return base, LORA["gemma2"], tensors


def test_a_merged_export_is_proven_before_it_is_published(given, tmp_path):
    base, lora, tensors = given

    def prove(directory):
        assert not (tmp_path / "out").exists()
        return prove_logits(base, lora, tensors, directory)

    how = ExportOptions(base_name="n", prove=prove)
    report = export_with_report(base, Adapter(lora, tensors), str(tmp_path / "out"), Layout.MERGED, how)
    off, effect = (
        float(word) for word in report["checks"][-1].replace(".\n", "").split() if "e" in word and "-" in word
    )
    assert off < 1e-4 < 0.1 < effect
    adapted, plain = (logits(base.directory, given_adapter) for given_adapter in (tensors, None))
    assert effect == pytest.approx(np.linalg.norm(plain - adapted) / np.linalg.norm(adapted), rel=0.5)
    with pytest.raises(ConfigError, match="is for a merged model in a local directory"):
        export_with_report(base, Adapter(lora, tensors), str(tmp_path / "again"), Layout.ADAPTER, how)


def test_one_that_is_not_merged_is_refused(given, tmp_path):
    base, lora, tensors = given
    with pytest.raises(
        ExportError, match=r"logits differ by 0\.\d+ of their norm .* 0\.0001 is what rounding explains"
    ):
        prove_logits(base, lora, tensors, write_model(tmp_path / "base", "gemma2"))
