"""`CkptTransformerBlock`: a transformer block that keeps little from forward to backward."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt import errors
from pyckpt.attend.context import ContextParallel, check_context, processes_of
from pyckpt.attend.dense import DenseAttend
from pyckpt.casting import autocasts
from pyckpt.compiling import uncompiled
from pyckpt.exec import compiled, node
from pyckpt.exec.layouts import check_whole_tokens
from pyckpt.exec.node import NO_SEED
from pyckpt.exec.plan import standard_plan
from pyckpt.exec.resident import BlockPlan
from pyckpt.exec.streamed_layers import InRun
from pyckpt.exec.tiling import TILE_BYTES
from pyckpt.reading import read_once
from pyckpt.save import Save, SaveSet, save_set
from pyckpt.spec import BlockSpec, Window
from pyckpt.tokenwise.generic import in_place, precision
from pyckpt.tokenwise.parameters import parameter_shapes
from pyckpt.tokenwise.seeded import SeededTokenwise, drops_inside
from pyckpt.tokenwise.tensor_parallel import TensorParallel, check_gathered, holders_of, own_parts
from pyckpt.vocab_parallel import is_dealt_out

INIT_STD = 0.02
_SCALE = errors.Range(
    "None or a positive finite number", errors.POSITIVE.holds, "; have pre give -q for a negative one"
)


class CheckpointedBlock(nn.Module):
    """What every block that runs on our executors has: a save set, a tile, and a plan for given inputs."""

    position_axes: int = 0
    """How many axes positions have, a further dim of theirs; 0 where a token's is a number."""

    def __init__(self, d_model: int, save: str | SaveSet | Save, tile: int | None, tile_bytes: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.save = save
        self.tile = tile
        self.tile_bytes = tile_bytes

    @property
    def save(self) -> str | Save:
        """Name of the save set, or the `Save` that was given; may be set at any time, also between the forward and the
        backward of other calls."""
        return self._given if isinstance(self._given, Save) else self._save.name

    @save.setter
    def save(self, value: str | SaveSet | Save) -> None:
        self._save = self._check_save(save_set(value))
        self._given = value

    @property
    def placed(self) -> Save | None:
        """Where what is kept waits for the backward; None where all of it stays."""
        return self._given if isinstance(self._given, Save) and self._given.place else None

    @property
    def tile(self) -> int | None:
        """Tokens in a tile of the tokenwise parts; None chooses from the shapes."""
        return self._tile

    @tile.setter
    def tile(self, value: int | None) -> None:
        self._tile = errors.check_tile(value)

    @property
    def tile_bytes(self) -> int:
        """Bytes that the tokenwise parts may take for a tile, where `tile` is None."""
        return self._tile_bytes

    @tile_bytes.setter
    def tile_bytes(self, value: int) -> None:
        self._tile_bytes = errors.check_tile_bytes(value)

    @property
    def spec_text(self) -> str | None:
        """The spec, of a block whose spec says all, as torch.compile needs it."""
        return None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of its weights, as far as the block knows what they have to be."""
        return {}

    @property
    def has_own_forward(self) -> bool:
        """Somebody has put another forward into it, or into its class: its weights and its plan are not all of it."""
        return type(self).forward is not CheckpointedBlock.forward or "forward" in vars(self)

    @property
    def drops(self) -> bool:
        """Whether a forward in the present mode draws a seed for dropout."""
        return False

    @property
    def experts_per_token(self) -> int:
        """How many of the experts in its weights of three dims each token meets."""
        return 1

    def mixes_dtypes(self, name: str) -> bool:
        """The weight of this name may have another dtype than x."""
        return False

    def _check_save(self, save: SaveSet) -> SaveSet:
        return save

    def weights(self) -> dict[str, Tensor]:
        """The block's parameters by name, checked to be those that its executor knows."""
        raise NotImplementedError

    def matrices(self) -> dict[str, Tensor]:
        """The same, with something of the size of the matrix in the place of a weight that is stored otherwise."""
        return self.weights()

    def like_weights(self) -> Tensor:
        """An empty tensor of the dtype and device of its weights, of a matrix where there is one."""
        weights = list(self.weights().values())
        found = next((w for w in weights if w.dim() == 2), weights[0])
        return torch.empty(0, dtype=found.dtype, device=found.device)

    def plan(self, tokens: int, x_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> BlockPlan:
        """How to run `tokens` tokens of `x_dtype` with products in `dtype`."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        context: ContextParallel | None = None,
        pyckpt_call: InRun | None = None,
    ) -> Tensor:
        """y, with the shape and dtype of x.

        x: (B, S, d_model), or packed (T, d_model) with `cu_seqlens` (N + 1,) int32, the sequences' starts and, last,
        T. positions: (S,), (B, S) or (T,) int, for RoPE, with `rope_axes` one more dim, of the axes; by default
        they count from 0 in every sequence, the same on all axes.
        context: the processes that share the sequences. Then x and y are this one's part (`ContextParallel.shard`), S
        and T in the others are those of the whole.

        Raises ValueError on shapes, dtypes or devices that do not fit, before anything runs. (`pyckpt_call` is how a
        streamed run calls a block whose weights FSDP2 gathers.)
        """
        if pyckpt_call is not None:
            return pyckpt_call.run.layer(pyckpt_call.block, x, self.weights)
        if context is not None and positions is not None:
            positions = check_context(context).shard_positions(positions, x, self.position_axes)
        return run_blocks([self], x, positions, cu_seqlens, context=context)


class CkptTransformerBlock(CheckpointedBlock):
    """A transformer block whose backward recomputes what its `save` set does not keep.

    Args:
        d_model: width of the residual stream.
        n_heads, n_kv_heads: query heads, and key/value heads that they share (default: n_heads).
        head_dim: default d_model / n_heads.
        d_ff: width of the MLP; default 8/3 d_model rounded up to 128 for gated MLPs, 4 d_model for plain ones.
        norm: "rmsnorm" or "layernorm"; `norm_eps` its epsilon; `norm_offset` what is added, in float32, to the
            weights of all norms, QK-norm's too (1.0 in Gemma, whose weights start at 0).
        mlp: gated "swiglu", "geglu", "geglu_tanh"; plain "gelu", "gelu_tanh", "relu2".
        norm_placement: where the norms stand around a sublayer f. "pre": x + f(norm(x)); "sandwich": x +
            norm(f(norm(x))), as in Gemma 2 and 3; "output": x + norm(f(x)), as in OLMo 2; "post": norm(x + f(x)), as
            in the original transformer and BERT.
        residual: "sequential", mid = x + attention(norm(x)), y = mid + mlp(norm(mid)); "parallel", y = x +
            attention(norm(x)) + mlp(norm(x)) with a norm for each (as in GPT-NeoX); "parallel_shared", with one norm,
            `input_layernorm`, for both (as in GPT-J and Cohere).
        residual_multiplier: of what each sublayer adds to x (Granite); with norm_placement "pre" alone.
        bias: biases on all linear layers (True), on none, or on a part: "qkv" (as in Qwen2), "attention" (those and the
            output projection's), "mlp".
        qk_norm: RMSNorm over each head of q and k before RoPE (Qwen3), or, "full", over all heads at once (OLMo 2).
        rope_theta: base of the rotary frequencies; None for no RoPE. rope_scaling: a dict as in Hugging Face configs,
            of rope_type "linear" or "llama3"; or "given", with `frequencies`, one for each pair of dims, and
            `amplitude`, which multiplies cos and sin (default 1), for any other. rope_dim: how many leading dims of
            each head it turns, default all (fewer in GPT-NeoX and Phi); rope_interleaved: pairs are neighbours (2i,
            2i + 1), as in GPT-J and Cohere, not (i, i + rope_dim / 2). rope_axes: positions have several axes (time,
            height and width in Qwen2-VL, rows and columns of an image), and each pair of dims turns by one: its number,
            for every pair.
        causal, window, softcap: see `pyckpt.attention`; attention_scale: its `scale`, but above 0, default
            head_dim ** -0.5.
        dropout: rate, in [0, 1), on the outputs of attention and of the MLP before each is added to the residual
            stream; attention_dropout: that on attention probabilities, by default the same. In training mode only.
            One seed a forward comes from PyTorch's default generator; what is dropped depends on it and on positions
            alone, so that tiles, save sets and recomputation drop the same values.
        save: what lives from forward to backward, see `pyckpt.save`, and with a `pyckpt.Save` where; gradients are
            bitwise the same for all.
        tile: tokens that norm, projections and MLP take at a time; None chooses by `tile_bytes`, and on a CPU what
            runs best.
        tile_bytes: what these parts may take for a tile, beside the tensors of the whole sequence.
        device, dtype: of the parameters, by default PyTorch's; float32, float64, bfloat16 or float16.

    Parameter names are those of a Hugging Face Llama decoder layer, so `load_state_dict(layer.state_dict())` works.
    Norms after the sublayers have the names of Gemma 2 ("sandwich") and of OLMo 2 ("output", and "post" too).
    Weights start normal with standard deviation 0.02, biases at zero. Forward hooks on the inner modules
    (`self_attn.q_proj` and so on) do not run: the block reads their parameters and calls its own kernels.

    Raises ValueError for options that do not fit, whatever their type, and TypeError for a dtype that is none, before
    anything is built.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        d_ff: int | None = None,
        norm: str = "rmsnorm",
        norm_eps: float = 1e-5,
        norm_offset: float = 0.0,
        mlp: str = "swiglu",
        norm_placement: str = "pre",
        residual: str = "sequential",
        residual_multiplier: float = 1.0,
        bias: bool | str = False,
        qk_norm: bool | str = False,
        rope_theta: float | None = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_dim: int | None = None,
        rope_interleaved: bool = False,
        rope_axes: Sequence[int] | None = None,
        causal: bool = True,
        window: int | Window | None = None,
        softcap: float | None = None,
        attention_scale: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        save: str | SaveSet | Save = "attention",
        tile: int | None = None,
        tile_bytes: int = TILE_BYTES,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        errors.check_dtype("dtype", dtype)
        spec = BlockSpec.make(
            d_model,
            n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            d_ff=d_ff,
            norm=norm,
            norm_eps=norm_eps,
            norm_offset=norm_offset,
            mlp=mlp,
            norm_placement=norm_placement,
            residual=residual,
            residual_multiplier=residual_multiplier,
            bias=bias,
            qk_norm=qk_norm,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rope_dim=rope_dim,
            rope_interleaved=rope_interleaved,
            rope_axes=rope_axes,
            causal=causal,
            window=window,
            softcap=softcap,
            attention_scale=attention_scale,
            dropout=dropout,
            attention_dropout=attention_dropout,
        )
        super().__init__(spec.d_model, save, tile, tile_bytes)
        self.spec, self.position_axes = spec, spec.position_axes
        self._spec_text = spec.to_string()
        self._shapes = parameter_shapes(spec)
        self._names = tuple(self._shapes)
        self._known = frozenset(self._names)
        _build(self, self._shapes, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                nn.init.constant_(p, 1.0 - self.spec.norm_offset)

    @property
    def spec_text(self) -> str | None:
        return self._spec_text if self._holders is None else None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._part[2]

    @property
    def drops(self) -> bool:
        return self.training and self.spec.drops

    @property
    def _holders(self) -> TensorParallel | None:
        attention: Any = self.self_attn
        return holders_of(attention.o_proj.weight)

    @property
    def _part(self) -> tuple[BlockSpec, TensorParallel | None, Mapping[str, tuple[int, ...]]]:
        """What this process computes of weights that are dealt out, with whom, and the shapes of its parts."""
        processes = self._holders
        return (self.spec, None, self._shapes) if processes is None else _part_of(self.spec, processes)

    def weights(self) -> dict[str, Tensor]:
        others: list[str] = []
        found = dict(_parameters(self, others))
        if found.keys() != self._known:
            odd = sorted(found.keys() ^ self._known)
            advice = "Adapters and parametrizations that replace inner layers are not read by its kernels: merge them"
            if "_flat_param" in odd:
                advice = "FSDP1 leaves a block its parameters with use_orig_params=True alone"
            raise RuntimeError(
                f"the parameters of this CkptTransformerBlock are not the ones it was built with: {', '.join(odd)} "
                f"added or missing. {advice}"
            )
        if others:
            kind = type(self.get_submodule(others[0])).__name__
            raise RuntimeError(
                f"{others[0]} of this CkptTransformerBlock is a {kind}, which the block does not call: its kernels "
                "read the parameters, and compute what the layer that was there did. Put that back (merge adapters), "
                "or use a CkptGenericBlock, which calls the modules it is given"
            )
        whole = {name: found[name] for name in self._names}
        if self._holders is None:
            return whole
        for path, module in self.named_modules():
            if path:
                check_whole_tokens(path, module)
        return own_parts(whole)

    def plan(self, tokens: int, x_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> BlockPlan:
        spec, processes, _ = self._part
        options = (tokens, x_dtype, dtype, device, self._tile_bytes, processes)
        return standard_plan(spec, self._save, self._tile, *options)

    def extra_repr(self) -> str:
        s = self.spec
        return (
            f"d_model={s.d_model}, n_heads={s.n_heads}, n_kv_heads={s.n_kv_heads}, head_dim={s.head_dim}, "
            f"d_ff={s.d_ff}, norm={s.norm!r}, mlp={s.mlp!r}, "
            f"norm_placement={s.norm_placement!r}, residual={s.residual!r}, save={self.save!r}, tile={self.tile}"
        )


class CkptGenericBlock(CheckpointedBlock):
    """A block of any tokenwise `pre` and `post` modules around our attention.

        q, k, v = pre(x, positions)
        y = post(x, o)

    with x and y (t, d_model), positions (t,), q (t, n_heads * head_dim), k (t, n_kv_heads * head_dim),
    v (t, n_kv_heads * v_head_dim) and o (t, n_heads * v_head_dim). `v_head_dim` is head_dim, unless given: latent
    attention (DeepSeek-V2, section 2.1) has another.

    Both must treat every token by itself (they get any contiguous range of tokens) and be deterministic, but for
    `nn.Dropout` modules in them, which drop the same again: they run again in the backward, under autograd, one tile at
    a time, in the train mode that they had. What has a gradient and is read by them has to be an input or a parameter
    (`LostGradientError` else). What else draws random numbers raises RuntimeError.

    x and the positions come as the block got them, o in the dtype of the products: x's, or autocast's where that is on,
    as it is then for what `pre` and `post` compute too. q, k and v may have any floating dtype and are brought to that
    of the products; y is brought to x's.

    Args:
        pre, post: the modules; their parameters are the block's.
        d_model, n_heads, n_kv_heads, head_dim: as for `CkptTransformerBlock`. v_head_dim: see above.
        causal, window, softcap: see `pyckpt.attention`; scale: its `scale`, but above 0, default head_dim ** -0.5.
        save: "attention+qkv", "attention" or "input", or a `pyckpt.Save` of one of them.
        tile: tokens that `pre` and `post` take at a time; None chooses by `tile_bytes`. tile_bytes: what they may take
            for a tile.

    Raises TypeError for what is no module and a scale that is no number, ValueError for options that do not fit.
    """

    def __init__(
        self,
        pre: nn.Module,
        post: nn.Module,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        causal: bool = True,
        window: int | Window | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        save: str | SaveSet | Save = "attention",
        tile: int | None = None,
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        for name, part in (("pre", pre), ("post", post)):
            if not isinstance(part, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(part).__name__}")
        if v_head_dim is not None:
            v_head_dim = errors.positive_int("v_head_dim", v_head_dim, "a positive int, or None for head_dim")
        if scale is not None:
            scale = errors.number("scale", scale, _SCALE, "have pre multiply q by it")
        spec = BlockSpec.make(
            d_model,
            n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            rope_theta=None,
            causal=causal,
            window=window,
            softcap=softcap,
        )
        super().__init__(spec.d_model, save, tile, tile_bytes)
        self.pre, self.post = pre, post
        self._attend = DenseAttend(
            spec.n_heads,
            spec.n_kv_heads,
            spec.head_dim,
            spec.window,
            spec.softcap,
            spec.scale if scale is None else scale,
            v_head_dim=None if v_head_dim == spec.head_dim else v_head_dim,
        )

    def _check_save(self, save: SaveSet) -> SaveSet:
        if save.mid or save.mlp:
            if not (save.qkv and not save.mlp):
                raise ValueError(
                    f"save={save.name!r} names tensors inside `post`, which a generic block cannot see; expected "
                    "'attention+qkv', 'attention' or 'input'"
                )
            return SaveSet(save.name, attention=True, qkv=True)
        return save

    @property
    def drops(self) -> bool:
        return drops_inside(self)

    def weights(self) -> dict[str, Tensor]:
        with in_place():
            return dict(self.named_parameters())

    def plan(self, tokens: int, x_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> BlockPlan:
        from pyckpt.exec.plan import generic_plan

        return generic_plan(
            SeededTokenwise(self.pre, self.post, precision(device, x_dtype, dtype)),
            self._attend,
            self._save,
            self._tile,
            self.d_model,
            tokens,
            dtype,
            device,
            self._tile_bytes,
        )


def run_blocks(
    blocks: list[CheckpointedBlock],
    x: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    checked: bool = False,
    context: ContextParallel | None = None,
    rows: int = 1,
) -> Tensor:
    """Run consecutive blocks as one autograd node (see `pyckpt.exec.node`), after checking the inputs.

    `checked`: the values of cu_seqlens are known to be right, and need not be read. With `context`, x and positions are
    this process's part, packed ones of `rows` rows of which each is dealt out, and cu_seqlens are those of all tokens.
    """
    if context is not None:
        check_context(context)
        if torch.compiler.is_compiling():  # what processes say to each other is nothing that a graph knows
            return _run_uncompiled(blocks, x, positions, cu_seqlens, checked, context, rows)
    first, x = blocks[0], waited_for(x)
    compute = compute_dtype(x)
    if x.is_meta and len(blocks) > 1:  # nothing is kept there: a segment has the shapes of its blocks
        for block in blocks:
            x = run_blocks([block], x, positions, cu_seqlens, checked, context, rows)
        return x
    if is_dealt_out(x):
        raise ValueError(
            f"x is a DTensor, {x.placements}: a block takes a tensor of its own in each process; give "  # type: ignore[attr-defined]
            "x.full_tensor(), or x.to_local() of a replicated one"
        )
    errors.check_activations(x, first.d_model, packed=cu_seqlens is not None)
    weights = [block.weights() for block in blocks]
    for block, part in zip(blocks, weights, strict=True):
        check_weights(block, part, x, compute)
    opaque = torch.compiler.is_compiling() or x.is_meta  # no values to look at
    if cu_seqlens is not None and not checked and not opaque:
        all_tokens = x.shape[0] * processes_of(context)
        errors.check_cu_seqlens(cu_seqlens, all_tokens, x.device, asker=first)
    if positions is not None:
        positions = errors.check_positions(positions, x, axes_of(blocks))
    tokens = x.numel() // x.shape[-1]
    flat = tuple(w for part in weights for w in part.values())
    placed = None if x.is_meta else first.placed
    if opaque and len(blocks) == 1 and first.spec_text is not None and placed is None and context is None:
        options = (first.spec_text, first._save.name, first.tile, first.tile_bytes, compute)
        return compiled.block(*options, x, positions, cu_seqlens, draw_seeds(blocks), flat)
    if x.is_meta:
        raise ValueError(
            f"x is on the meta device, where a {type(first).__name__} cannot run: its modules and attention compute by "
            "tiles, with values; give x on a device that has some, and the block with .to_empty(device=...)"
        )
    plans = [block.plan(tokens, x.dtype, compute, x.device) for block in blocks]
    run = node.Run(plans, [tuple(part) for part in weights], compute, placed)
    if run.shared and plans[0].processes is None:
        raise ValueError(
            f"save= places {', '.join(run.shared)} with processes, and this block's weights are whole: only where "
            'tensor parallelism deals them out do processes have the same. Place them on the "host" or in a "file"'
        )
    if context is not None:
        run = _shared(run, context, cu_seqlens, rows, first)
    return _execute(run, x, positions, cu_seqlens, draw_seeds(blocks), flat)


_run_uncompiled = uncompiled(run_blocks)


def axes_of(blocks: Sequence[CheckpointedBlock]) -> int:
    """How many axes the positions have that these blocks take; see `CheckpointedBlock.position_axes`."""
    return max(block.position_axes for block in blocks)


def _shared(
    run: node.Run, context: ContextParallel, cu_seqlens: Tensor | None, rows: int, asker: CheckpointedBlock
) -> node.Run:
    """The same run, of a part of sequences that processes share."""
    plans = [dataclasses.replace(plan, attend=context.attend(plan.attend)) for plan in run.plans]
    read = None
    if cu_seqlens is not None:
        values = read_once(cu_seqlens, "starts", asker, cu_seqlens.tolist)
        read = (values, values) if cu_seqlens.dim() == 1 else (values[0], values[1])
    return dataclasses.replace(run, plans=plans, context=context, read=read, rows=rows)


def check_weights(block: CheckpointedBlock, weights: Mapping[str, Tensor], x: Tensor, compute: torch.dtype) -> None:
    """Raise ValueError where weights have other shapes than the block's, or are dealt out to processes still, or are on
    another device than x; and where matrices are of another dtype."""
    one_dtype = compute == x.dtype and not autocasts(x.device.type, x.dtype)
    shapes, device, dtype = block.shapes, x.device, x.dtype
    for name, w in weights.items():
        if shapes:  # else they belong to modules that are called, whose own hooks see to what is dealt out
            check_gathered(name, w)
        if shapes and w.shape != shapes[name]:
            raise ValueError(
                f"{name} has shape {tuple(w.shape)}, expected {shapes[name]}: it was replaced, or it is sharded and "
                "not gathered for the block's call. Build a block of these sizes, and load the weights into it"
            )
        apart = w.device != device and w.dim() > 0
        if (apart or (one_dtype and w.dtype != dtype and w.dim() == 2)) and not block.mixes_dtypes(name):
            errors.check_matches(x, w, name, w.dim() == 2)


# torch.compile would compile the functions that a forward calls, and not those of its backward: what these make again
# would have other bits. And copies beside compute are nothing that a compiled graph knows.
_execute = uncompiled(node.execute)


def draw_seeds(blocks: list[CheckpointedBlock]) -> Tensor | None:
    """One seed a block that drops, int64 (blocks,) on the CPU; None, and no number drawn, where none does.

    From the default generator of the CPU: reading a GPU's would wait for it.
    """
    if not any(block.drops for block in blocks):
        return None
    seeds = [torch.randint(2**62, (), device="cpu") for block in blocks if block.drops]
    drawn = iter(seeds)
    return torch.stack([next(drawn) if block.drops else torch.tensor(NO_SEED, device="cpu") for block in blocks])


def waited_for(x: Any) -> Any:
    """x, as a tensor of its own where it is the result of a collective of PyTorch's that may be under way."""
    # Any op that is no view waits, and gives what it waited for.
    return torch.ops.aten._unsafe_view(x, x.shape) if type(x).__name__ == "AsyncCollectiveTensor" else x


def compute_dtype(x: Any) -> torch.dtype:
    """The dtype of products and attention: x's own, or autocast's where it is on."""
    errors.check_tensor("x", x)
    return torch.get_autocast_dtype(x.device.type) if autocasts(x.device.type, x.dtype) else x.dtype


def _parameters(module: nn.Module, others: list[str], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """`named_parameters` of a tree that shares none, for less time.

    `others` gets the names of modules that do something else than those that `_build` made.
    """
    for name, p in module._parameters.items():
        if p is not None:
            yield prefix + name, p
    for name, child in module._modules.items():
        if child is not None:
            kind: Any = type(child)
            if (kind not in _CARRIERS and kind.forward not in _CARRIED) or "forward" in child.__dict__:
                others.append(prefix + name)
            yield from _parameters(child, others, f"{prefix}{name}.")


@functools.lru_cache(64)
def _part_of(
    spec: BlockSpec, processes: TensorParallel
) -> tuple[BlockSpec, TensorParallel, Mapping[str, tuple[int, ...]]]:
    why = processes.why_not(spec)
    if why is not None:
        raise ValueError(f"this CkptTransformerBlock is dealt out to processes (tensor parallelism), and {why}")
    part = processes.part_of(spec)
    return part, processes, parameter_shapes(part)


# What `_build` makes, and what their calls run: FSDP2 gives a module a class of its own that inherits it.
_CARRIERS: frozenset[Any] = frozenset((nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Module))
_CARRIED = frozenset(kind.forward for kind in _CARRIERS)


def _build(root: nn.Module, shapes: dict[str, tuple[int, ...]], **factory: Any) -> None:
    """Add the modules that carry these parameters: Linear for matrices, norms for vectors."""
    factory["device"] = factory["device"] or torch.get_default_device()
    for name, shape in shapes.items():
        path, _, kind = name.rpartition(".")
        if kind == "bias":
            continue
        parent: nn.Module = root
        *outer, leaf = path.split(".")
        for part in outer:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(leaf, _carrier(shape, f"{path}.bias" in shapes)(**factory))


def _carrier(shape: tuple[int, ...], bias: bool) -> Callable[..., nn.Module]:
    if len(shape) == 2:
        return functools.partial(_empty_linear, shape[1], shape[0], bias)
    if bias:
        return functools.partial(nn.LayerNorm, shape[0])
    return functools.partial(nn.RMSNorm, shape[0])


def _empty_linear(d_in: int, d_out: int, bias: bool, device: Any, dtype: torch.dtype | None) -> nn.Linear:
    """With no values, as `nn.utils.skip_init` makes it, which FakeTensorMode does not take."""
    made = nn.Linear(d_in, d_out, bias, device="meta", dtype=dtype)
    for name, p in made.named_parameters():
        setattr(made, name, nn.Parameter(torch.empty_like(p, device=device)))
    return made
