"""Configuration of runs: presets, YAML and back, and what is said of settings that cannot be."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from umd.checkpoint import save_checkpoint
from umd.config import ModelConfig, ObjectiveConfig
from umd.errors import UserError
from umd.model import UMD
from umd.train.presets import PRESETS
from umd.train.run import RunConfig, classify_config, finetune_config, from_plain, read_config, to_plain, write_config
from umd.train.weights import load_model

TINY = ModelConfig(image_size=(8, 8), patch_size=2, hidden_size=32, depth=1, decoder_depth=1, num_heads=2)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_yaml_and_json(name, tmp_path):
    config = replace(PRESETS[name][1], out=tmp_path / "run")
    write_config(config)
    assert read_config(tmp_path / "run") == config == read_config(tmp_path / "run" / "config.yaml")
    assert from_plain(RunConfig, json.loads(json.dumps(to_plain(config))), "a checkpoint") == config
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_moved_run_is_where_it_lies(tmp_path):
    """Else `umd sample` would read the weights of the folder that it was copied from."""
    write_config(replace(PRESETS["umd-tiny"][1], out=tmp_path / "before"))
    (tmp_path / "before").rename(tmp_path / "now")
    assert read_config(tmp_path / "now").out == tmp_path / "now"
    assert read_config(tmp_path / "now" / "config.yaml").out == tmp_path / "before"


def test_settings_that_are_not_defaults_survive_yaml(tmp_path):
    config = RunConfig(
        out=tmp_path,
        model=replace(TINY, image_size=(8, 16), adaLN=False, embedding="released", num_classes=9),
        objective=ObjectiveConfig(no_noise_prob=1 / 3, mask_ratio=0.1, mask_ratio_no_noise=0.9),
        init=Path("runs/before"),
        batch_size=6,
        accumulate=3,
        epochs=0.5,
        minutes=1e-5,
        compile=True,
    )
    write_config(config)
    assert read_config(tmp_path) == config


def test_the_presets_are_the_published_settings():
    """The paper: r0, mt, m0 and adaLN of UMD, MAE, MaskDiT and DiT; batch 1024 (MAE 4096), 800 epochs, 64x64 in 4x4."""
    for name, r0, mt, m0, adaLN, batch in (
        ("umd-b4", 0.5, 0.375, 0.75, True, 1024),
        ("mae-b4", 1.0, None, 0.75, False, 4096),
        ("maskdit-b4", 0.0, 0.5, None, True, 1024),
        ("dit-b4", 0.0, 0.0, None, True, 1024),
    ):
        config = PRESETS[name][1]
        assert config.objective.no_noise_prob == r0 and config.model.adaLN is adaLN
        assert mt is None or config.objective.mask_ratio == mt
        assert m0 is None or config.objective.mask_ratio_no_noise == m0
        assert (config.batch_size, config.epochs) == (batch, 800)
        assert config.model.num_patches == 256 and config.model.hidden_size == 768
        assert (config.optim.lr, config.optim.betas, config.optim.weight_decay) == (1.5e-4, (0.9, 0.95), 0.05)


def test_the_latent_presets_are_the_published_settings():
    """ViT-L/2 with a decoder of 8 on 32x32x4 latents, linear schedule; the rest as in pixels, DiT for 400 epochs."""
    for name in ("umd", "mae", "maskdit", "dit"):
        config, pixels = PRESETS[f"{name}-l2"][1], PRESETS[f"{name}-b4"][1]
        model = config.model
        assert (model.channels, *model.image_size, model.patch_size, model.num_patches) == (4, 32, 32, 2, 256)
        assert (model.hidden_size, model.depth, model.decoder_depth, model.num_heads) == (1024, 24, 8, 16)
        assert model.adaLN is pixels.model.adaLN and config.objective == pixels.objective
        assert (config.schedule.name, config.schedule.num_steps) == ("linear", 1000)
        assert (config.batch_size, config.optim) == (pixels.batch_size, pixels.optim)
        assert config.epochs == (400 if name == "dit" else 800)
        tuned = finetune_config(config, Path("runs/a"), 1000, Path("runs/b"))
        assert tuned.schedule == config.schedule and tuned.data.source == config.data.source
        assert (tuned.batch_size, tuned.epochs, tuned.objective.no_noise_prob) == (256, 50, 0.05)


def test_the_model_says_what_the_data_look_like():
    config = RunConfig(model=replace(TINY, image_size=(8, 12), channels=1))
    assert config.data.image_size == (8, 12) and config.data.channels == 1
    assert replace(config, model=TINY).data.image_size == (8, 8)


def test_distances_are_for_networks_that_draw_samples():
    config = RunConfig(model=replace(TINY, num_classes=3), evaluate_minutes=5)
    assert finetune_config(config, Path("a"), 3, Path("b")).evaluate_minutes == 5
    assert classify_config(config, Path("a"), Path("b"), False, False).evaluate_minutes == 0
    with pytest.raises(UserError, match="evaluate_minutes is for networks that draw samples"):
        replace(PRESETS["diffmae-tiny"][1], evaluate_minutes=5)
    for changes, said in (
        ({"evaluate_count": 1}, "evaluate_count 1: must be at least 2"),
        ({"save_minutes": -1}, "save_minutes -1: must be at least 0"),
        ({"draw_minutes": float("nan")}, "draw_minutes nan: must be a finite number and at least 0"),
        ({"save_every": 0}, "save_every 0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            RunConfig(**changes)


def test_a_file_of_before_the_clock_saves_and_draws_by_steps(tmp_path):
    values = to_plain(RunConfig(save_every=1000, draw_every=0))
    for name in ("save_minutes", "draw_minutes", "evaluate_minutes", "evaluate_count"):
        del values[name]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    config = read_config(tmp_path)
    assert (config.save_every, config.draw_every, config.draws) == (1000, 0, False)


def test_the_fine_tuning_recipe_keeps_the_network_and_the_data():
    before = PRESETS["umd-b4"][1]
    after = finetune_config(before, Path("runs/a"), 10, Path("runs/b"))
    assert after.init == Path("runs/a") and after.out == Path("runs/b")
    assert after.model == replace(before.model, num_classes=10)
    assert after.data.source == before.data.source and after.data.area_min == 0.95
    assert (after.objective.no_noise_prob, after.objective.mask_ratio) == (0.05, 0.0)
    assert after.optim.weight_decay == 0 and after.batch_size == 256


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bach_size: 3", "unknown setting bach_size; did you mean batch_size"),
        ("model: {dept: 3}", "unknown setting model.dept; did you mean model.depth"),
        ("model: {xyz: 1}", "unknown setting model.xyz; ModelConfig has .*depth"),
        ("3: 4", "unknown setting 3"),
        ("out: [", "is not valid YAML in line 1"),
        ("seed: 0\nbatch_size:\t\t- 3", "is not valid YAML in line 2"),
        ("out: 2020-13-01", "is not valid YAML"),
        ("- 1", "holds no settings .a list"),
        ("", "holds no settings .it is empty"),
        ("batch_size: many", "batch_size is 'many'; expected a whole number"),
        ("batch_size: 1.5", "batch_size is 1.5; expected a whole number"),
        ("batch_size: true", "batch_size is True; expected a whole number"),
        ("optim: {lr: fast}", "optim.lr is 'fast'; expected a number"),
        ("compile: 1", "compile is 1; expected true or false"),
        ("model: 3", "model is 3; expected settings"),
        ("model: {image_size: 32}", "model.image_size is 32; expected 2 of these: a whole number"),
        ("model: {image_size: [32]}", "model.image_size is .32.; expected 2 of these"),
        ("schedule: {name: cosin}", "schedule.name is 'cosin'; expected one of cosine, "),
        ("precision: fp16", "precision is 'fp16'; expected one of auto, bf16, fp32"),
        ("batch_size: 0", "batch_size 0: must be at least 1"),
        ("{batch_size: 10, accumulate: 3}", "batch_size 10 is not divisible by accumulate 3"),
        ("{epochs: 0}", "length of a run"),
        ("{steps: -1}", "steps -1: must be at least 0"),
        ("optim: {ema: 2}", "optim.ema 2: must be at least 0 and below 1"),
        ("optim: {betas: [2, .nan]}", "optim.betas 2 nan: each must be a finite number and at least 0 and below 1"),
        ("model: {depth: twelve}", "model.depth is 'twelve'; expected a whole number"),
        ("seed: -1", "seed -1: must be at least 0"),
        ("model: {image_size: [30, 30]}", "30x30 is not divisible by patch size 4; use 28x28"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text, said, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path / "config.yaml") in str(caught.value)


def test_yaml_in_utf_16_is_read(tmp_path):
    """Windows' Notepad and PowerShell write it; YAML allows it."""
    (tmp_path / "config.yaml").write_text("batch_size: 8\nout: läufe", encoding="utf-16")
    assert (read_config(tmp_path).batch_size, read_config(tmp_path / "config.yaml").out) == (8, Path("läufe"))
    (tmp_path / "config.yaml").write_text("batch_size: 8", encoding="utf-16-le")  # without a mark it could be anything
    with pytest.raises(UserError, match="config.yaml is not valid YAML"):
        read_config(tmp_path)


def test_a_file_or_folder_without_settings(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.yaml"):
        with pytest.raises(UserError, match="no run configuration"):
            read_config(path)


def test_numbers_as_people_write_them(tmp_path):
    """YAML 1.1 takes 1e-4, without a point, for text; an integer will do for a float."""
    (tmp_path / "config.yaml").write_text("{optim: {lr: 1e-4, clip: 1}, epochs: 3, init: null}")
    config = read_config(tmp_path)
    assert config.optim.lr == 1e-4 and config.optim.clip == 1 and config.epochs == 3 and config.init is None
    assert isinstance(config.epochs, float)


def test_the_written_file_is_plain_yaml(tmp_path):
    write_config(RunConfig(out=tmp_path, model=TINY))
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert values["model"]["image_size"] == [8, 8] and values["out"] == str(tmp_path)


def save_run(root: Path, **parts: UMD) -> Path:
    tensors = {part: dict(model.named_parameters()) for part, model in parts.items()}
    save_checkpoint(root / "checkpoints", 1, tensors, {"config": to_plain(RunConfig(out=root, model=TINY))})
    return root


def test_a_network_is_read_with_its_average_or_without(tmp_path):
    torch.manual_seed(0)
    own, average = UMD(TINY), UMD(TINY)
    run = save_run(tmp_path, model=own, ema=average)
    for path in (run, run / "checkpoints", run / "checkpoints" / "step-00000001"):
        for ema, expected in ((True, average), (False, own)):
            loaded = load_model(path, ema=ema)
            assert loaded.config == TINY and not loaded.training
            for a, b in zip(loaded.parameters(), expected.parameters(), strict=True):
                assert torch.equal(a, b) and not a.requires_grad


def test_without_an_average_the_weights_themselves(tmp_path):
    own = UMD(TINY)
    loaded = load_model(save_run(tmp_path, model=own), ema=True)
    assert torch.equal(loaded.head.weight, own.head.weight)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    save_checkpoint(tmp_path, 1, {"model": {"w": torch.zeros(3)}}, {})
    with pytest.raises(UserError, match="does not say which network it is of"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        load_model(tmp_path / "nowhere")
