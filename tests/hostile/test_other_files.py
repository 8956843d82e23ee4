"""Data folders, tokenizers and Hugging Face folders of somebody else: nothing that they name or hold is run."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import subprocess
from collections import Counter
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from megatron.energon import WorkerConfig, get_train_dataset

from omni_train.data.rows.codes import CODES, codes_of
from omni_train.data.samples import chat_template
from omni_train.data.samples.chat_template import check_template
from omni_train.data.samples.sample import SampleError
from omni_train.data.samples.sources import first_samples, open_source
from omni_train.data.samples.tokenizer import Tokenizer
from omni_train.data.stream.streams import StreamReader, StreamState, open_stream
from omni_train.data_pipelines.shards import index_shards, write_files
from omni_train.interop.folder import Folder
from omni_train.recipe.schema import ChatTemplate, DataConfig, SourceConfig
from tests.data.conftest import MODEL, tokenizer_folder  # noqa: F401  a fixture
from tests.support.codec import MODEL as SPEAKS
from tests.support.hostile import CALLS, torch_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path, mark) -> Path:
    """Shards whose samples have, beside their text, files that decoders of webdataset or energon would unpickle."""
    folder = tmp_path / "shards"
    code = pickle.dumps(CALLS["exec"](mark))

    def files(split: str):
        for n in range(8):
            yield f"{split}-{n}.json", json.dumps({"text": f"{n}: one two three four"}).encode()
            yield from ((f"{split}-{n}.{suffix}", code) for suffix in ("pickle", "pkl", "pyd", "pth", "npy"))

    for split in ("train", "val"):
        write_files(folder / f"{split}-00000.tar", files(split))
    index_shards(folder)
    return folder


def test_files_of_a_sample_that_decoders_would_unpickle(folder, tokenizer_folder, mark):  # noqa: F811
    source, refused = open_source(SourceConfig(str(folder)), "train", training=False), Counter()
    assert len(list(first_samples(source, 8, refused))) == 8 and not refused
    sources = [SourceConfig(str(folder))]
    config = DataConfig("small", "unused", sources, tokenizer=str(tokenizer_folder), row_tokens=64, alignment=16)
    stream = open_stream(
        [source], Tokenizer(tokenizer_folder), config, MODEL, stream=0, streams=1, seed=0, repeat=False
    )
    rows = [row for row, _ in itertools.islice(StreamReader(stream, StreamState()), 2)]
    assert sum(row.samples for row in rows) >= 4
    assert not mark.exists()


def names_code(mark: Path, **more) -> str:
    return json.dumps({"__module__": "os", "__function__": "system", "command": f"touch {mark}"} | more)


def test_what_a_data_folder_names_in_its_settings(folder, mark):
    settings = folder / ".nv-meta"
    (settings / "loader.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef sample_loader(_):\n    return {{}}\n")
    (settings / "dataset.yaml").write_text(
        "sample_type:\n  __module__: megatron.energon\n  __class__: TextSample\n"
        "sample_loader: loader.py:sample_loader\npart_filter: loader.py:sample_loader\n"
    )
    workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
    options = {"batch_size": 1, "shuffle_buffer_size": None, "max_samples_per_sequence": None}
    get_train_dataset(folder, worker_config=workers, **options)
    assert mark.exists()  # so does energon itself
    mark.unlink()
    assert len(open_source(SourceConfig(str(folder)), "train", training=True)) == 8
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("split.yaml", "split_parts: {code}\nexclude: []\n"),
        ("split.yaml", '!!python/object/apply:os.system ["touch {mark}"]\n'),
        ("split.yaml", 'split_parts:\n  train: !!python/object/apply:os.system ["touch {mark}"]\nexclude: []\n'),
        (".info.json", '{{"shard_counts": {code}, "energon_version": "7"}}'),
        (".info.yaml", 'shard_counts: !!python/object/apply:os.system ["touch {mark}"]\n'),
    ],
)
def test_what_the_index_of_a_data_folder_names(folder, mark, refused, name, text):
    if name == ".info.yaml":
        (folder / ".nv-meta" / ".info.json").unlink()
    (folder / ".nv-meta" / name).write_text(text.format(code=names_code(mark), mark=mark))
    refused(lambda: open_source(SourceConfig(str(folder)), "train", training=True), match=r"data\.sources: \S+shards")


def test_codes_that_are_a_pickle(mark):
    file = io.BytesIO()
    np.save(file, np.array([CALLS["exec"](mark)], dtype=object), allow_pickle=True)
    for data in (file.getvalue(), pickle.dumps(CALLS["exec"](mark))):
        with pytest.raises(Exception, match=r"."):
            np.load(io.BytesIO(data), allow_pickle=True).item()()
        assert mark.exists()
        mark.unlink()
        with pytest.raises(SampleError, match="codes_unreadable"):
            codes_of({CODES: data}, SPEAKS, 100)
        assert not mark.exists()


ESCAPES = {
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "attr": "{{ (raise_exception|attr('__globals__'))['__builtins__']['exec']('open(\"MARK\", \"w\")') }}",
    "map": "{{ ([raise_exception]|map(attribute='__globals__')|first).__builtins__.exec('open(\"MARK\", \"w\")') }}",
}


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_chat_template_of_a_tokenizer(tmp_path, mark, escape, place):
    template = ESCAPES[escape].replace("MARK", str(mark))
    jinja2.Environment().from_string(template).render(raise_exception=lambda message: None)
    assert mark.exists()
    mark.unlink()
    (tmp_path / place).write_text(template if place.endswith("jinja") else json.dumps({"chat_template": template}))
    assert "writes chats in another way" in check_template(tmp_path, ChatTemplate.chatml)
    assert not mark.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 12 }}",
    ],
)
def test_a_chat_template_of_any_time_and_memory(tmp_path, monkeypatch, template):
    (tmp_path / "chat_template.jinja").write_text(template)
    renderer = tmp_path / "render.py"
    renderer.write_text(chat_template._RENDERER.read_text().replace("CPU_SECONDS = 10", "CPU_SECONDS = 1"))
    monkeypatch.setattr(chat_template, "_RENDERER", renderer)
    assert "writes chats in another way" in check_template(tmp_path, ChatTemplate.chatml)


def test_weights_that_are_a_pickle_are_not_imported(tmp_path, call, refused):
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "code.Config"}}))
    (tmp_path / "code.py").write_text("raise SystemExit\n")
    torch_file(tmp_path / "pytorch_model.bin", {"weight": call})
    refused(Folder, tmp_path, match=r"no tensors here; give a folder with \*\.safetensors")
    named = {"weight_map": {"weight": "pytorch_model.bin"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(named))
    refused(Folder, tmp_path, match=r"pytorch_model\.bin: not a complete safetensors file")


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory) -> Path:
    from transformers import WavLMConfig, WavLMModel

    one = dict(conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,), num_feat_extract_layers=1, num_hidden_layers=1)
    two = dict(num_attention_heads=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
    folder = tmp_path_factory.mktemp("wavlm")
    model = WavLMModel(WavLMConfig(hidden_size=16, intermediate_size=24, **one, **two))
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "genuine.bin")
    return folder


def test_a_teacher_is_read_from_a_pickle_of_tensors_alone(wavlm, call, refused):
    import megatron.core  # noqa: F401  which registers arrays with torch.load

    from omni_train.frozen.wavlm import WavLM

    def read():
        return WavLM(str(wavlm), torch.device("cpu"))

    weights = wavlm / "pytorch_model.bin"
    weights.write_bytes((wavlm / "genuine.bin").read_bytes())
    genuine = torch.load(weights)
    assert torch.equal(read().model.state_dict()["encoder.layer_norm.weight"], genuine["encoder.layer_norm.weight"])
    for other in (call, np.zeros(3, np.uint32)):
        torch_file(weights, genuine | {"more": other})
        refused(read, match=r"no WavLM model can be read here: \S")


def test_the_configuration_of_a_teacher_names_no_code(wavlm, tmp_path, monkeypatch):
    from transformers import modeling_utils

    from omni_train.frozen.wavlm import WavLM

    def run(*_, **__):
        raise AssertionError("a kernel is fetched and run")

    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", run)
    (wavlm / "pytorch_model.bin").write_bytes((wavlm / "genuine.bin").read_bytes())
    file = wavlm / "config.json"
    genuine = json.loads(file.read_text())
    try:
        more = {"attn_implementation": "somebody/kernel", "quantization_config": {"a": 1}}
        file.write_text(json.dumps(genuine | more))
        config = WavLM(str(wavlm), torch.device("cpu")).model.config
    finally:
        file.write_text(json.dumps(genuine))
    assert config._attn_implementation != "somebody/kernel" and not hasattr(config, "quantization_config")


@pytest.mark.parametrize("ranks", [1, 2])
def test_modules_in_the_folder_that_a_run_is_started_in(tmp_path, mark, ranks):
    for name in ("ctypes", "hydra", "json", "logging", "numpy", "rich", "subprocess", "torch", "yaml"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    done = subprocess.run(
        [ROOT / "launchers" / "local.sh", str(ranks), "train", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert "omni-train train" in done.stdout, done.stderr
    assert not mark.exists()
