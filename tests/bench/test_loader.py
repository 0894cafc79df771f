"""`umd bench loader`: what it writes, and that its cases do what their names say."""

import json

import pytest
from rich.console import Console

pytest.importorskip("diffusers", reason="VAE and DiT come from diffusers: pip install diffusers")

from umd.bench import loader  # noqa: E402
from umd.bench.loader import (  # noqa: E402
    GROUPS,
    READERS,
    LoaderBench,
    count_flops,
    dit_on_stored,
    step_on_stored,
)
from umd.cli import main  # noqa: E402
from umd.errors import UserError  # noqa: E402
from umd.train.data import has_dali  # noqa: E402

SMALL = {"model": "UMD-Ti/2", "shallower": 2, "latent_size": 8, "batch": 4, "stored": 64}
SMALL |= {"num_workers": 0, "device": "cpu"}
SMALL |= {"vae_channels": (8, 8, 8, 8)}  # Stable Diffusion's structure, not its 84 million weights


@pytest.mark.slow
def test_rows_and_ratios(tmp_path):
    file = tmp_path / "new" / "loader.json"
    options = "--groups latents steps --model UMD-Ti/2 --shallower 2 --latent-size 8 --batch 4 --stored 64"
    options += " --num-workers 0 --repeats 3 --device cpu --vae-channels 8 8 8 8"
    main(["bench", "loader", *options.split(), "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["settings"]["model"] == "UMD-Ti/2" and result["settings"]["repeats"] == 3
    rows = {row["name"]: row for row in result["rows"]}
    names = ["encode with the VAE", "read stored latents"]
    names += ["umd, stored latents", "waiting for them", "umd, VAE in the step", "dit, stored latents"]
    assert list(rows) == names
    for row in rows.values():
        assert 0 < row["min"] <= row["seconds_per_sample"] <= row["max"]
    ratios = {ratio["name"]: ratio for ratio in result["ratios"]}
    assert {"encoding / reading", "wait / step", "VAE in the step / stored"} < set(ratios)
    umd, dit = rows["umd, stored latents"]["flops"], rows["dit, stored latents"]["flops"]
    assert ratios["UMD / DiT of equal depth"]["flops"] == umd / dit


def test_the_published_flop_ratio():
    """The paper's 42 % less: UMD-L/2 against a DiT of as many blocks, here at its token counts and a narrow width."""
    bench = LoaderBench(**{**SMALL, "latent_size": 32, "batch": 2, "dtype": "fp32"})
    with step_on_stored(bench) as umd, dit_on_stored(bench) as dit:
        umd_flops, dit_flops = (count_flops(make) for case in (umd, dit) for make in case.flops.values())
    assert 0.55 < umd_flops / dit_flops < 0.63


def test_what_cannot_be_measured():
    for bad in ({"groups": ("disks",)}, {"batch": 0}, {"repeats": 0}):
        with pytest.raises(UserError, match="disks" if "groups" in bad else next(iter(bad))):
            LoaderBench(**bad)
    assert set(LoaderBench().groups) <= set(GROUPS)


@pytest.mark.slow
def test_every_reader_has_a_row():
    result = loader.run(LoaderBench(groups=("pictures",), repeats=1, stored=64, latent_size=8), Console(quiet=True))
    readers = [row["name"] for row in result["rows"]]
    assert readers == [name for name in READERS if has_dali() or "DALI" not in name]
    assert all(0 < row["seconds_per_sample"] < 1 for row in result["rows"])
