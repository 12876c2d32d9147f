"""TruePose in PyTorch, on diffusers' UNet blocks: what the JAX model is compared with, in numbers and in speed.

Opens the folder that `convert to-torch` writes, with or without carried latents, cosine logits and H = F' + H'; a half-cell
head it refuses. Its loss is Eq. 2 / 10 alone. Written from the paper's equations and the readings A1 to A24 of them; it shares
no code with truepose_jax, and agreed with it at its first run; what changed since is what it computes when, ties, and what
HPFA carries (BUILD_NOTES.md). NCHW, latents in and out: the autoencoder is not part of it. Eq. 6 is an eager masked
attention, all others are scaled_dot_product_attention.

    model = TruePose.from_pretrained("exported", torch_dtype=torch.bfloat16).to("cuda")
    model.denoise = torch.compile(model.denoise)
    latents = model.sample(inputs, noise, steps=35, guidance=3.5)

Letters: b targets, s sources (b = s times the targets per source), p parsing classes, n = h w cells, g heads, d head
width, K regions.
"""

import itertools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

POSE_WIDTHS = (16, 32, 96)
SOURCE_MODES = ("cached", "recompute")
OURS = ("carry_latents", "cosine", "residual")


class Inputs(NamedTuple):
    """What a batch tells of its sources and target poses.

    source: latents [s c h w]. parsing: labels [s H W] at image size, H = h * factor. tokens: CLIP embeddings
    [s p+1 e], one per class, the last of the whole image. present: bool [s p+1], which classes have a region.
    class_on: bool [b p], classes that the target pose switches on. pose: skeleton pictures [b 3 H W] in [0, 1].
    """

    source: Tensor
    parsing: Tensor
    tokens: Tensor
    present: Tensor
    class_on: Tensor
    pose: Tensor


class SiteFeatures(NamedTuple):
    """What one block of TargetNet reads of the source: Eq. 8's and Eq. 9's keys and values, each [b g m d]. Where latents are
    carried, hpfa_v holds the source's [b g m c] behind the features."""

    hpfa_k: Tensor
    hpfa_v: Tensor
    caa_k: Tensor
    caa_v: Tensor
    caa_mask: Tensor  # bool [b 1 1 K], True = read


class Conditioning(NamedTuple):
    """All that does not depend on t. pose: [b c h w], kept in both branches. sites: None for the null branch."""

    pose: Tensor
    sites: tuple[SiteFeatures, ...] | None


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def reweighted_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, settings: dict[str, Any]) -> Tensor:
    """Eq. 6 and 7: softmax((q k^T / sqrt d) * M') v, all [b g n d]; mask: bool [b n], the cells inside M."""
    if settings["mask_axis"] == "none":
        return F.scaled_dot_product_attention(q, k, v)
    of_key, of_query = mask[:, None, None, :], mask[:, None, :, None]
    inside = {"key": of_key, "query": of_query, "outer": of_key & of_query}[settings["mask_axis"]]
    delta, sigma = settings["delta"], settings["sigma"]
    outside_rising, outside_falling = (sigma, 1 + sigma) if settings["reading"] == "printed" else (1 + sigma, sigma)
    logits = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    rising = logits > 0
    weights = torch.where(
        inside, torch.where(rising, 1 + delta, delta), torch.where(rising, outside_rising, outside_falling)
    )
    return torch.softmax(logits * weights, dim=-1).to(v.dtype) @ v


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


class HPFA(nn.Module):
    """Eq. 8 of one block, and the projections of Eq. 6 to 8. channels: of latents that it carries, 0 for none."""

    def __init__(self, width: int, heads: int, channels: int, cosine: bool):
        super().__init__()
        self.heads, self.channels = heads, channels
        self.cosine_scale = nn.Parameter(torch.empty(heads, 1)) if cosine else None
        for name in ("source_to_q", "source_to_k", "source_to_v", "to_q", "to_k", "to_v"):
            self.add_module(name, nn.Linear(width, width, bias=False))
        self.norm = nn.LayerNorm(width)
        self.to_out = nn.ModuleList([nn.Linear(width + heads * channels, width)])

    def forward(self, hidden: Tensor, site: SiteFeatures | None) -> Tensor:
        if site is None:  # zero keys and values leave the bias alone (A15)
            return self.to_out[0].bias
        q, scale = split_heads(self.to_q(self.norm(hidden)), self.heads), None
        if self.cosine_scale is not None:
            q, scale = unit(q) * self.cosine_scale.exp()[:, None], 1.0
        found = F.scaled_dot_product_attention(q, site.hpfa_k, site.hpfa_v, scale=scale)
        if not self.channels:
            return self.to_out[0](merge_heads(found))
        features, latents = found.split([q.shape[-1], self.channels], dim=-1)
        return self.to_out[0](torch.cat([merge_heads(features), merge_heads(latents)], dim=-1))


class SourceBlock(nn.Module):
    """diffusers' transformer block that also gives norm1's output to the list in `encoder_hidden_states` (A6).

    What follows the last block's norm1 is read by nobody and left out.
    """

    def __init__(self, block: nn.Module, last: bool):
        super().__init__()
        self.last = last
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        encoder_hidden_states: tuple[Tensor, list[Tensor]] | None = None,
        encoder_attention_mask: None = None,
        timestep: None = None,
        cross_attention_kwargs: None = None,
        class_labels: None = None,
    ) -> Tensor:
        context, taps = encoder_hidden_states
        normed = self.norm1(hidden_states)
        taps.append(normed)
        if self.last:
            return hidden_states
        hidden_states = hidden_states + self.attn1(normed)
        hidden_states = hidden_states + self.attn2(self.norm2(hidden_states), encoder_hidden_states=context)
        return hidden_states + self.ff(self.norm3(hidden_states))


class TargetBlock(nn.Module):
    """attn1, HPFA, CAA in the place of attn2, feed-forward, each added (A7 to A9); `encoder_hidden_states` is a tuple
    with every block's SiteFeatures, or None."""

    def __init__(self, block: nn.Module, index: int, settings: dict[str, Any], channels: int):
        super().__init__()
        self.index, self.settings = index, settings
        for name, child in block.named_children():
            self.add_module(name, child)
        carried = channels if settings["carry_latents"] else 0
        self.hpfa = HPFA(self.norm1.normalized_shape[0], self.attn1.heads, carried, settings["cosine"])

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        encoder_hidden_states: tuple[SiteFeatures, ...] | None = None,
        encoder_attention_mask: None = None,
        timestep: None = None,
        cross_attention_kwargs: None = None,
        class_labels: None = None,
    ) -> Tensor:
        site = None if encoder_hidden_states is None else encoder_hidden_states[self.index]
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states))
        hidden_states = hidden_states + self.hpfa(hidden_states, site)
        hidden_states = hidden_states + self.caa(hidden_states, site)
        return hidden_states + self.ff(self.norm3(hidden_states))

    def caa(self, hidden: Tensor, site: SiteFeatures | None) -> Tensor:
        """Eq. 9."""
        if site is None:
            return self.attn2.to_out[0].bias
        q = split_heads(self.attn2.to_q(self.norm2(hidden)), self.attn2.heads)
        read = F.scaled_dot_product_attention(q, site.caa_k, site.caa_v, attn_mask=site.caa_mask)
        return self.attn2.to_out[0](merge_heads(read))

    def source_side(
        self,
        features: Tensor,
        mask: Tensor,
        coverage: Tensor,
        tokens: Tensor,
        present: Tensor,
        keep: Tensor,
        latents: Tensor,
    ) -> SiteFeatures:
        """features: F' [b n c]. mask: M [b n]. coverage [b n p]. tokens [b p e], present [b p]. keep [b]: 0 or 1. latents: of
        the source [b n c]."""
        hpfa, heads = self.hpfa, self.attn2.heads
        source_q, source_k, v = (
            split_heads(to(features), heads) for to in (hpfa.source_to_q, hpfa.source_to_k, hpfa.source_to_v)
        )
        kept = keep.to(v.dtype)[:, None, None]
        # Of a dropped sample V' = 0 is enough: H' is zero, and nothing reaches Q' and K' in the backward pass.
        fused = merge_heads(reweighted_attention(source_q, source_k, v * kept[..., None], mask, self.settings))
        if self.settings["residual"]:
            fused = fused + features * kept
        k, v = (split_heads(to(fused), heads) for to in (hpfa.to_k, hpfa.to_v))
        if self.settings["cosine"]:
            k = unit(k)
        if self.settings["carry_latents"]:
            v = torch.cat([v, (latents.to(v.dtype) * kept)[:, None].expand(-1, heads, -1, -1)], dim=-1)
        index, chosen = self.least_attended(source_q.detach(), source_k.detach(), coverage, present)
        regions = torch.take_along_dim(tokens, index[..., None], dim=1) * keep[:, None, None]
        # A sample without any region reads zeros, since no softmax is over nothing (A19).
        some = chosen.any(dim=1, keepdim=True)
        caa_v = split_heads(self.attn2.to_v(regions), heads) * some[:, :, None, None]
        return SiteFeatures(
            k,
            v,
            split_heads(self.attn2.to_k(regions), heads),
            caa_v,
            (chosen | ~some)[:, None, None, :],
        )

    def least_attended(self, q: Tensor, k: Tensor, coverage: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """(classes [b K], which of them exist): mean of A' over heads, queries and the region's cells (A17 to A19).

        The mean of q . k over all queries is the mean query's, which each cell's key meets once.
        """
        in_region = coverage / coverage.sum(dim=1, keepdim=True).clamp(min=1e-12)
        with torch.autocast(q.device.type, enabled=False):  # which would round the scores that decide
            cells = torch.einsum("bgd,bgnd->bn", q.float().mean(dim=2), k.float())
            scores = torch.einsum("bnp,bn->bp", in_region, cells)
        scores = scores.masked_fill(~present, torch.inf)  # the lowest win: 1/g and 1/sqrt d change no order
        # Small regions in one coarse cell have one score; the first of equals is taken, as topk would not promise.
        lowest, index = (x[:, : self.settings["regions"]] for x in scores.sort(dim=1, stable=True))
        return index, torch.isfinite(lowest)


class PoseEncoder(nn.Module):
    """Four convolutions from the skeleton picture to features after conv_in, 1/stride of its size (A20)."""

    def __init__(self, features: int, stride: int):
        super().__init__()
        halvings = stride.bit_length() - 1
        widths = (3, *POSE_WIDTHS)
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            self.add_module(f"conv_{i}", nn.Conv2d(before, after, 3, stride=2 if i < halvings else 1, padding=1))
        self.conv_out = nn.Conv2d(widths[-1], features, 3, padding=1)

    def forward(self, skeleton: Tensor) -> Tensor:
        x = skeleton.to(self.conv_out.weight.dtype)
        for conv in (self.conv_0, self.conv_1, self.conv_2):
            x = F.silu(conv(x))
        return self.conv_out(x)


def find_sites(unet: UNet2DConditionModel) -> list[tuple[str, int]]:
    """(name, level) of every transformer block in the order in which the UNet runs them."""
    levels = len(unet.down_blocks)
    parts = [(f"down_blocks.{i}", block, i) for i, block in enumerate(unet.down_blocks)]
    parts.append(("mid_block", unet.mid_block, levels - 1))
    parts += [(f"up_blocks.{i}", block, levels - 1 - i) for i, block in enumerate(unet.up_blocks)]
    return [
        (f"{where}.attentions.{j}.transformer_blocks.{k}", level)
        for where, block, level in parts
        for j, transformer in enumerate(getattr(block, "attentions", ()))
        for k in range(len(transformer.transformer_blocks))
    ]


def run_unet(unet: UNet2DConditionModel, x: Tensor, t: Tensor, context: Any, after_conv_in: Tensor, *, head: bool):
    """UNet2DConditionModel's forward with features added after conv_in, and any object as context; NCHW.

    head False: without the last norm and convolution.
    """
    dtype = unet.conv_in.weight.dtype
    emb = unet.time_embedding(unet.time_proj(t).to(dtype))
    x = unet.conv_in(x.to(dtype)) + after_conv_in.to(dtype)
    skips = (x,)
    for block in unet.down_blocks:
        extra = {"encoder_hidden_states": context} if hasattr(block, "attentions") else {}
        x, new = block(x, emb, **extra)
        skips += new
    x = unet.mid_block(x, emb, encoder_hidden_states=context)
    for block in unet.up_blocks:
        count = len(block.resnets)
        used, skips = skips[-count:], skips[:-count]
        extra = {"encoder_hidden_states": context} if hasattr(block, "attentions") else {}
        # Odd sizes: halving rounds up, so the way back is told where to.
        x = block(x, used, emb, upsample_size=skips[-1].shape[2:] if skips else None, **extra)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x))).float() if head else x


def coverage_and_masks(
    parsing: Tensor, class_on: Tensor, *, factor: int, levels: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Per UNet level: the share of each cell that each class covers [s n p], and M [b n] (A2).

    A cell of level l is factor * 2^l pixels wide; those at the edge hold what is left. M: cells that the switched-on
    classes cover at least half of, and every switched-on class's best cell.
    """
    classes = class_on.shape[1]
    onehot = (parsing[:, None] == torch.arange(classes, device=parsing.device)[:, None, None]).float()
    coverages, masks = [], []
    for level in range(levels):

        def pixels(x: Tensor, side: int = factor * 2**level) -> Tensor:
            return F.avg_pool2d(x, side, ceil_mode=True, divisor_override=1).flatten(2).transpose(1, 2)

        counts, area = pixels(onehot), pixels(torch.ones_like(onehot[:1, :1]))
        coverage = counts / area
        coverages.append(coverage)
        repeat = len(class_on) // len(parsing)
        counts, coverage = counts.repeat_interleave(repeat, 0), coverage.repeat_interleave(repeat, 0)
        half = 2 * (counts * class_on[:, None]).sum(dim=-1) >= area[..., 0]
        on = class_on & (counts > 0).any(dim=1)
        best = coverage.argmax(dim=1)  # [b p]; the first of equals
        rescued = torch.zeros_like(half, dtype=torch.int).scatter_add(1, best, on.int()) > 0
        masks.append(half | rescued)
    return coverages, masks


def positions(h: int, w: int, features: int, device: torch.device) -> Tensor:
    """Fixed sinusoids [features h w] of y and x in [-1, 1]: cos and sin at features/4 frequencies, three octaves up
    from half a period over the picture; what four does not divide is 0."""
    quarter = features // 4
    frequencies = torch.pi / 2 * 2 ** torch.linspace(0, 3, quarter, device=device)

    def waves(n: int) -> Tensor:
        at = ((torch.arange(n, device=device) + 0.5) / n * 2 - 1)[None] * frequencies[:, None]
        return torch.cat([at.cos(), at.sin()])

    rows, columns = waves(h)[:, :, None].expand(-1, -1, w), waves(w)[:, None, :].expand(-1, h, -1)
    return F.pad(torch.cat([rows, columns]), (0, 0, 0, 0, 0, features - 4 * quarter))


class TruePose(nn.Module):
    """source_net and target_net are diffusers' UNets with their transformer blocks exchanged; each TargetBlock holds
    its HPFA. `scheduler` holds the noise schedule and says what the network predicts."""

    def __init__(
        self,
        source_net: UNet2DConditionModel,
        target_net: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        settings: dict[str, Any],
    ):
        super().__init__()
        self.source_net, self.target_net, self.scheduler, self.settings = source_net, target_net, scheduler, settings
        self.sites = find_sites(target_net)
        for index, (name, _) in enumerate(self.sites):
            parent, k = name.rsplit(".", 1)
            of_source, of_target = source_net.get_submodule(parent), target_net.get_submodule(parent)
            of_source[int(k)] = SourceBlock(of_source[int(k)], last=index == len(self.sites) - 1)
            of_target[int(k)] = TargetBlock(of_target[int(k)], index, settings["fusion"], target_net.config.in_channels)
        width = target_net.config.block_out_channels[0]
        self.pose_encoder = PoseEncoder(width, settings["pose_encoder"]["stride"])
        self.parsing_encoder = None
        if settings["source_parsing"] == "coverage":
            self.parsing_encoder = nn.ModuleDict({"class_bias": nn.Linear(settings["classes"], width, bias=False)})
        # In double, and no buffer: model.to(torch.bfloat16) would round it.
        self.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0).float()

    @classmethod
    def from_pretrained(cls, folder: str | Path, torch_dtype: torch.dtype = torch.float32) -> "TruePose":
        """RuntimeError where the folder's tensors are not exactly the model's, and for a model with a half-cell head."""
        folder = Path(folder)
        settings = json.loads((folder / "truepose.json").read_text())
        settings["fusion"] = dict.fromkeys(OURS, False) | settings["fusion"]  # older exports do not say them
        if settings.get("carry", {}).get("head") or "texture" in settings["fusion"]:
            raise RuntimeError(
                f"{folder}: this program has no half-cell head (carry.head) and no ablation; truepose_jax runs it"
            )
        nets = []
        for name in ("source_net", "target_net"):
            net, info = UNet2DConditionModel.from_pretrained(
                folder / name, torch_dtype=torch_dtype, output_loading_info=True, low_cpu_mem_usage=False
            )
            wrong = {kind: names for kind, names in info.items() if names}
            if wrong:
                raise RuntimeError(f"{folder / name}: {wrong}")
            nets.append(net)
        model = cls(*nets, DDIMScheduler.from_pretrained(folder / "scheduler"), settings)
        tensors = {
            re.sub(r"^hpfa\.(.*\.transformer_blocks\.\d+)\.", r"target_net.\1.hpfa.", name): tensor
            for name, tensor in load_file(folder / "truepose.safetensors").items()
        }
        own = {name for name in model.state_dict() if ".hpfa." in name or not name.startswith(("source_", "target_"))}
        if own != tensors.keys():
            raise RuntimeError(f"truepose.safetensors: {sorted(own ^ tensors.keys())} are on one side only")
        model.load_state_dict(tensors, strict=False)
        return model.to(torch_dtype)

    def _positions(self, latents: Tensor) -> Tensor:
        if self.settings["positions"] == "none":
            return torch.zeros((), device=latents.device)
        return positions(*latents.shape[2:], self.target_net.config.block_out_channels[0], latents.device)

    def source_features(self, source: Tensor, whole_image: Tensor, after_conv_in: Tensor) -> list[Tensor]:
        """Eq. 3: F' [s n c] of every block, at t = 0, with the whole image's token [s e] as context (A12, A13)."""
        taps: list[Tensor] = []
        t = torch.zeros(len(source), dtype=torch.long, device=source.device)
        run_unet(self.source_net, source, t, (whole_image[:, None], taps), after_conv_in, head=False)
        return taps

    def pose_and_masks(self, inputs: Inputs) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """What reads no latent: the pose's features [b c h w], coverages and masks (coverage_and_masks)."""
        stride, levels = self.settings["pose_encoder"]["stride"], len(self.target_net.down_blocks)
        coverages, masks = coverage_and_masks(inputs.parsing, inputs.class_on, factor=stride, levels=levels)
        return self.pose_encoder(inputs.pose) + self._positions(inputs.source), coverages, masks

    def source_side(
        self, inputs: Inputs, coverages: list[Tensor], masks: list[Tensor], keep: Tensor | None = None
    ) -> tuple[SiteFeatures, ...]:
        """Of every block. keep [b]: 0 drops a sample's F' and region tokens together (A15); None: all are kept."""
        dtype = self.source_net.conv_in.weight.dtype
        b, s = len(inputs.pose), len(inputs.source)
        keep = inputs.pose.new_ones(b) if keep is None else keep
        extra = self._positions(inputs.source)
        if self.parsing_encoder is not None:
            bias = self.parsing_encoder["class_bias"](coverages[0].to(dtype)).transpose(1, 2)
            extra = extra + bias.unflatten(2, inputs.source.shape[2:])
        tokens = inputs.tokens.to(dtype)
        taps = self.source_features(inputs.source, tokens[:, -1], extra)

        def each(x: Tensor) -> Tensor:
            return x.repeat_interleave(b // s, dim=0)

        regions, present = each(tokens[:, :-1]), each(inputs.present[:, :-1])
        coverages = [each(coverage) for coverage in coverages]
        # At an odd edge the mean of the cells that are there.
        latents = [
            each(F.avg_pool2d(inputs.source, 2**i, ceil_mode=True).flatten(2).transpose(1, 2))
            for i in range(len(coverages))
        ]
        return tuple(
            self.target_net.get_submodule(name).source_side(
                each(tap), masks[level], coverages[level], regions, present, keep.to(dtype), latents[level]
            )
            for (name, level), tap in zip(self.sites, taps, strict=True)
        )

    def condition(self, inputs: Inputs, keep: Tensor | None = None) -> Conditioning:
        pose, coverages, masks = self.pose_and_masks(inputs)
        return Conditioning(pose, self.source_side(inputs, coverages, masks, keep))

    def denoise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """TargetNet's output [b c h w], float32, at t int [b]. Sites of None: the null branch, which keeps the pose."""
        return run_unet(self.target_net, x_t, t, conditioning.sites, conditioning.pose, head=True)

    def loss(self, x0: Tensor, eps: Tensor, t: Tensor, inputs: Inputs, keep: Tensor, valid: Tensor) -> Tensor:
        """Eq. 2 / 10 over the samples of weight `valid` [b] (0 or 1): latents x0, noise eps, t int [b]."""
        abar = self.alphas_cumprod.to(x0.device)[t][:, None, None, None]
        signal, noise = abar.sqrt(), (1 - abar).sqrt()
        output = self.denoise(signal * x0 + noise * eps, t, self.condition(inputs, keep))
        target = {"epsilon": eps, "v_prediction": signal * eps - noise * x0, "sample": x0}
        errors = (output - target[self.scheduler.config.prediction_type]).square().mean(dim=(1, 2, 3))
        return torch.where(valid > 0, errors * valid, 0).sum() / valid.sum().clamp(min=1)

    @torch.no_grad()
    def sample(
        self, inputs: Inputs, noise: Tensor, *, steps: int = 35, guidance: float = 3.5, source: str = "cached"
    ) -> Tensor:
        """Latents [b c h w] by DDIM (eta 0) with guidance (Eq. 11), from `noise`.

        source "cached": the source's side once; "recompute": at every step, as where nothing is known of its being
        independent of t. Each step goes to the next timestep of the list, the last to abar[0].
        """
        if source not in SOURCE_MODES:
            raise ValueError(f"source is {source!r}; choose one of {SOURCE_MODES}")
        config = self.scheduler.config
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps.tolist()
        signals, spreads = self.alphas_cumprod.sqrt().tolist(), (1 - self.alphas_cumprod).sqrt().tolist()
        pose, coverages, masks = self.pose_and_masks(inputs)
        sites, x = self.source_side(inputs, coverages, masks), noise.float()
        for t, following in zip(timesteps, [*timesteps[1:], 0], strict=True):
            at = torch.full((len(x),), t, device=x.device)
            if source == "recompute" and t != timesteps[0]:
                sites = self.source_side(inputs, coverages, masks)
            output = self.denoise(x, at, Conditioning(pose, sites))
            if guidance != 1:
                null = self.denoise(x, at, Conditioning(pose, None))
                output = null + guidance * (output - null)
            signal, spread = signals[t], spreads[t]
            if config.prediction_type == "epsilon":
                x0 = (x - spread * output) / signal
            elif config.prediction_type == "v_prediction":
                x0 = signal * x - spread * output
            else:
                x0 = output
            if config.clip_sample:
                x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
            eps = (x - signal * x0) / spread
            x = signals[following] * x0 + spreads[following] * eps
        return x
