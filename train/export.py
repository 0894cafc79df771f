"""`umd export`: write a run in the format of another library.

timm           the encoder at t = 0 as a ViT: timm.create_model("local-dir:FOLDER", pretrained=True)
transformers   the same as ViTModel; an imported MAE with its decoder, as ViTMAEForPreTraining
diffusers      the generator as a pipeline, with UMD's network as its component
hub            UMD's network, for `umd.hub.UMDModel.from_pretrained`
small-vision   the UMD authors' names, .npz
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

import umd
from umd.classifier import encoder_weights
from umd.config import ModelConfig, kind_of
from umd.convert import to_small_vision
from umd.errors import UserError
from umd.files import check_place
from umd.hugging_face import statistics, to_vit, to_vit_mae
from umd.model import UMD
from umd.published import give, mae_links, vit_links
from umd.schedule import schedule_of
from umd.train import opened
from umd.train.options import Export
from umd.train.run import RunConfig, to_plain
from umd.train.sampling import clips
from umd.train.weights import load_model, saved_weights, weights_identity


def export(options: Export, config: RunConfig, console: Console) -> None:
    """Write the export folder with a model card.

    Raises:
        UserError: the library has no counterpart of the network, or the folder holds other things.
    """
    folder = options.out or options.run / options.kind
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; give another --out, or remove it")
    made = folder.with_name(f".unfinished-{folder.name}-{os.getpid()}")
    check_place(made)
    model = load_model(options.run, options.ema, image_size=options.image_size)
    if options.vae and options.kind != "diffusers":
        raise UserError(f"--vae is part of a pipeline of diffusers; leave it out with {options.kind}")
    if not isinstance(model, UMD):
        raise UserError(f"{options.run} holds a {kind_of(config.model)}; a UMD, DiT, MAE or MaskDiT can be exported")
    made.mkdir()
    try:
        usage = WRITERS[options.kind](model, made, config, options)
        (made / "README.md").write_text(model_card(options, model, config, usage))
        if folder.exists():
            folder.rmdir()
        made.replace(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    console.print(f"written: {folder}\n{usage.format(folder=folder)}", highlight=False, soft_wrap=True, markup=False)
    if options.push:
        push(folder, options.push)
        console.print(f"pushed: https://huggingface.co/{options.push}", highlight=False)


def folded(model: UMD, tool: str) -> dict[str, Tensor]:
    """Fold the encoder at t = 0 to a plain ViT. Returns weights under our names. Raises UserError if it cannot be."""
    if model.config.cond_tokens:
        raise UserError(
            f"this network without adaLN has a condition token that every block sees anew; {tool}'s ViT has none"
        )
    return {name: tensor.detach().cpu().contiguous() for name, tensor in encoder_weights(model).items()}


def write_timm(model: UMD, folder: Path, config: RunConfig, options: Export) -> str:
    c = model.config
    if c.norm_eps > 1e-6:
        raise UserError(f"timm's ViT has 1e-6 in its norms, this network {c.norm_eps:g}; export it to transformers")
    H, W = c.image_size
    weights = give_encoder(folded(model, "timm"), c)
    if c.num_cls > 1:  # timm calls further CLS tokens registers
        weights["cls_token"], weights["reg_token"] = weights["cls_token"][:, :1], weights["cls_token"][:, 1:]
    arguments: dict[str, Any] = dict(
        img_size=[H, W], patch_size=c.patch_size, in_chans=c.channels, embed_dim=c.hidden_size, depth=c.depth,
        num_heads=c.num_heads, mlp_ratio=c.mlp_ratio, class_token=c.num_cls > 0, reg_tokens=max(c.num_cls - 1, 0),
        no_embed_class=True, global_pool="token" if c.num_cls else "avg", fc_norm=False,
        act_layer="gelu_tanh" if c.gelu == "tanh" else "gelu",
    )  # fmt: skip
    mean, std = statistics(c.channels)[c.pixel_stats]
    pretrained = dict(
        input_size=[c.channels, H, W], fixed_input_size=True, mean=mean, std=std, interpolation="bicubic",
        crop_pct=1.0, num_classes=0, pool_size=None, first_conv="patch_embed.proj", classifier="head",
    )  # fmt: skip
    write_json(
        folder / "config.json",
        {"architecture": "vit_base_patch16_224", "num_classes": 0, "num_features": c.hidden_size,
         "global_pool": arguments["global_pool"], "model_args": arguments, "pretrained_cfg": pretrained},
    )  # fmt: skip
    save_weights({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    usage = 'model = timm.create_model("local-dir:{folder}", pretrained=True)'
    if c.num_cls > 1:
        usage += f"\nfeatures = model.forward_features(images)[:, :{c.num_cls}].mean(1)  # the averaged CLS tokens"
    return usage


def write_transformers(model: UMD, folder: Path, config: RunConfig, options: Export) -> str:
    c = model.config
    if c.num_cls != 1:
        raise UserError(f"transformers' ViT has one CLS token, this network {c.num_cls}; export it to timm")
    if c.image_size[0] != c.image_size[1]:
        raise UserError(f"transformers' ViT sees squares, this network {c.image_size[0]}x{c.image_size[1]}")
    common: dict[str, Any] = dict(
        hidden_size=c.hidden_size, num_hidden_layers=c.depth, num_attention_heads=c.num_heads,
        intermediate_size=int(c.hidden_size * c.mlp_ratio), image_size=c.image_size[0], patch_size=c.patch_size,
        num_channels=c.channels, layer_norm_eps=c.norm_eps, qkv_bias=True, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, hidden_act="gelu" if c.gelu == "exact" else "gelu_pytorch_tanh",
    )  # fmt: skip
    mean, std = statistics(c.channels)[c.pixel_stats]
    processor: dict[str, Any] = dict(
        do_normalize=True, do_rescale=True, do_resize=True, image_mean=mean, image_std=std,
        image_processor_type="ViTImageProcessor", rescale_factor=1 / 255,
        size={"height": c.image_size[0], "width": c.image_size[1]}, resample=3,
    )  # fmt: skip
    write_json(folder / "preprocessor_config.json", processor)
    if is_mae(c):
        name, state = "ViTMAEForPreTraining", to_vit_mae(give(model, mae_links(c)))
        common |= dict(
            model_type="vit_mae", decoder_hidden_size=c.decoder_width, decoder_num_hidden_layers=c.decoder_depth,
            decoder_num_attention_heads=c.decoder_vit.num_heads,
            decoder_intermediate_size=int(c.decoder_width * c.mlp_ratio),
            mask_ratio=getattr(config.objective, "mask_ratio_no_noise", 0.75),
            norm_pix_loss=getattr(config.objective, "norm_pix", False),
        )  # fmt: skip
        usage = 'model = transformers.ViTMAEForPreTraining.from_pretrained("{folder}")'
    else:
        name, state = "ViTModel", to_vit(give_encoder(folded(model, "transformers"), c))
        common |= dict(model_type="vit")
        usage = 'model = transformers.ViTModel.from_pretrained("{folder}", add_pooling_layer=False)'
        usage += "\nfeatures = model(images).last_hidden_state[:, 0]"
    write_json(folder / "config.json", {"architectures": [name]} | common)
    save_weights(state, folder / "model.safetensors")
    return usage


def is_mae(c: ModelConfig) -> bool:
    """Whether the network is transformers' ViTMAE, decoder included."""
    return (
        c.outputs == "x_start" and c.embedding == "none" and c.norm_affine and c.decoder == "self"
        and bool(c.decoder_depth and c.decoder_hidden_size)
    )  # fmt: skip


def write_diffusers(model: UMD, folder: Path, config: RunConfig, options: Export) -> str:
    try:
        import diffusers

        from umd.pipeline import UMDTransformer
    except ImportError as error:
        raise UserError(f"exporting a pipeline needs diffusers ({error}); pip install diffusers") from error
    if model.config.outputs in ("x_start", "edm"):
        raise UserError(
            "an MAE draws no samples: export it to timm or transformers" if model.config.outputs == "x_start" else
            "diffusers' schedulers add noise of variance 1 - ᾱ; MaskDiT's process is EDM's: sample it with umd sample"
        )  # fmt: skip
    schedule = schedule_of(config.schedule)
    learned = model.config.outputs == "eps_sigma"
    tokenizer = opened.open_tokenizer(config, options.vae, torch.device("cpu"))
    scheduler = dict(
        num_train_timesteps=schedule.num_steps, trained_betas=schedule.betas.tolist(),
        clip_sample=clips(config, tokenizer), prediction_type="epsilon", timestep_spacing="trailing",
    )  # fmt: skip
    cls: Any = diffusers.DDPMScheduler if learned else diffusers.DDIMScheduler
    extra = {"variance_type": "learned_range"} if learned else {"set_alpha_to_one": True}
    cls(**scheduler, **extra).save_pretrained(folder / "scheduler")
    UMDTransformer.of(model).save_pretrained(folder / "transformer")
    (folder / "transformer" / "umd_transformer.py").write_text(
        "from umd.pipeline import UMDTransformer  # pip install umd, from its repository\n\n"
        '__all__ = ["UMDTransformer"]\n'
    )
    (folder / "pipeline.py").write_text('from umd.pipeline import UMDPipeline\n\n__all__ = ["UMDPipeline"]\n')
    index: dict[str, Any] = {
        "_class_name": ["pipeline", "UMDPipeline"], "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", cls.__name__], "transformer": ["umd_transformer", "UMDTransformer"],
    }  # fmt: skip
    index["vae"] = [None, None]
    if tokenizer is not None:
        tokenizer.network.save_pretrained(folder / "vae")
        index["vae"] = ["diffusers", tokenizer.vae.kind]
    write_json(folder / "model_index.json", index)
    call = "class_labels=[0, 1], guidance_scale=4.0" if model.config.num_classes else "num_images=4"
    usage = 'pipeline = diffusers.DiffusionPipeline.from_pretrained("{folder}", trust_remote_code=True)'
    return f"{usage}\nimages = pipeline({call}).images"


def write_hub(model: UMD, folder: Path, config: RunConfig, options: Export) -> str:
    from umd.hub import UMDModel

    UMDModel.of(model).save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # our model card replaces it
    return 'model = umd.hub.UMDModel.from_pretrained("{folder}")'


def write_small_vision(model: UMD, folder: Path, config: RunConfig, options: Export) -> str:
    params: dict[str, Any] = {f"params/{name}": value for name, value in to_small_vision(model).items()}
    np.savez(folder / "checkpoint.npz", **params)
    return "umd import small-vision {folder}/checkpoint.npz reads it again"


WRITERS = {
    "timm": write_timm, "transformers": write_transformers, "diffusers": write_diffusers, "hub": write_hub,
    "small-vision": write_small_vision,
}  # fmt: skip


def give_encoder(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename an encoder's weights to timm's names."""
    links = vit_links(config)
    return {link.theirs: link.to_theirs(weights[name]).contiguous() for name, link in links.items() if name in weights}


def save_weights(state: dict[str, Tensor], file: Path) -> None:
    save_file(state, file, metadata={"format": "pt"})


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


def push(folder: Path, repo: str) -> None:
    """Upload a folder to the Hugging Face hub. Raises UserError with the hub's message."""
    try:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:  # no network, no login, no such user: each raises its own kind
        raise UserError(f"{folder} is written, but could not be pushed to {repo}: {error}") from error


def model_card(options: Export, model: UMD, config: RunConfig, usage: str) -> str:
    """Write the model card in Markdown with the hub's header: usage, recipe, data, scores, commit."""
    weights = weights_identity(options.run, options.ema)
    folder = Path(umd.__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("model_card.md").render(
        library=LIBRARIES.get(options.kind, "umd"), usage=usage.format(folder="FOLDER"),
        run=options.run.resolve().name, weights=weights, count=sum(p.numel() for p in model.parameters()),
        model=model.config, config=config, length=config.length, source=Path(config.data.source).name,
        version=umd.__version__, commit=commit(), scores=read_scores(options.run),
        imported=saved_weights(options.run)[0].state.get("imported"),
        settings=json.dumps(to_plain(config), indent=1),
    )  # fmt: skip


LIBRARIES = {"timm": "timm", "transformers": "transformers", "diffusers": "diffusers"}


def read_scores(run: Path) -> str:
    """The run's table from `umd evaluate`, "" if there is none."""
    try:
        return (run / "scores.md").read_text("utf-8").strip()
    except OSError:
        return ""


def commit() -> str:
    """Git commit of this code, "" if it is not a checkout."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(umd.__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()[:12]
