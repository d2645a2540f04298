"""summary: what a model shares, layer by layer, and what it does not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from rpg_kernels._wrappers import unwrap
from rpg_kernels.bank.parameter_bank import ParameterBank
from rpg_kernels.law.placement import check_laps
from rpg_kernels.nn import VirtualLayer
from rpg_kernels.nn.part import bank_name, banks_of


@dataclass(frozen=True)
class LayerSummary:
    """One rpg layer: where its virtual weight lies and how it is scaled.

    ``start`` and ``span`` are a ring address (on a bank with laps one that is not wrapped) and a
    length in elements, padding counted; ``laps`` is span / dof; ``std`` is the standard deviation
    of the unpacked weight at initialisation; ``residual`` that of a least-squares start, or None;
    ``tied_to`` the layer whose virtual weight this one uses, or ""; ``window`` the bank's, or None;
    ``taps`` those of a unit, or None where the bank has no units; ``bank`` the name of the bank
    that it reads: ``rpg_bank_<group>`` in a model with groups, else that under which it stands in
    the model, usually ``rpg_bank``.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    virtual_weights: int
    layer: int
    granularity: int
    start: int
    span: int
    laps: float
    scale: float
    std: float
    residual: float | None
    tied_to: str
    window: int | None = None
    taps: int | None = None
    bank: str = ""


@dataclass(frozen=True)
class Summary:
    """What ``rpg.summary`` returns. Printable.

    ``virtual_weights`` counts tied weights once; ``dof`` is of all banks together; ``unshared`` is
    the number of other trainable parameters; ``idle`` says of which banks a part is never read,
    because they have more laps than the model compresses. Where there are several banks, what
    ``banks`` and ``idle`` say begins with their names.
    """

    layers: tuple[LayerSummary, ...]
    skipped: dict[str, str]
    banks: tuple[str, ...]
    dof: int
    virtual_weights: int
    unshared: int
    idle: tuple[str, ...] = ()

    @property
    def compression(self) -> float:
        """Virtual weights per degree of freedom."""
        return self.virtual_weights / self.dof if self.dof else 0.0

    def __str__(self) -> str:
        several = len(self.banks) > 1
        bank = ["bank"] if several else []
        header = ["layer", *bank, "shape", "virtual", "g", "start", "laps", "scale", "std", ""]
        rows = [header]
        for x in self.layers:
            note = f"tied to {x.tied_to}" if x.tied_to else ""
            if x.residual is not None:
                note = f"{note} residual {x.residual:.1%}".strip()
            shape = "x".join(map(str, x.shape))
            rows.append(
                [
                    x.name,
                    *([x.bank] if several else []),
                    shape,
                    f"{x.virtual_weights:,}",
                    str(x.granularity),
                    f"{x.start:,}",
                    f"{x.laps:.3g}",
                    f"{x.scale:.4g}",
                    f"{x.std:.4g}",
                    note,
                ]
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        left = {*range(len(bank) + 2), len(header) - 1}
        lines = [
            "  ".join(
                c.ljust(w) if i in left else c.rjust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines += list(self.banks)
        lines.append(
            f"{self.virtual_weights:,} virtual weights from {self.dof:,} degrees of freedom "
            f"({self.compression:.3g} uses each), {self.unshared:,} parameters not shared"
        )
        lines += [f"WARNING: {each}" for each in self.idle]
        if self.virtual_weights and self.compression <= 1 and not self.idle and not several:
            end = 0
            for x in self.layers:
                if not x.tied_to:
                    end = -(-end // x.granularity) * x.granularity + x.span
            uses = "at most once" if end <= self.dof else "at most twice, padding counted"
            if any(x.window or x.taps for x in self.layers):  # units may be cut where it closes
                uses = "about once"
            lines.append(f"the bank is at least as large as the model: each slot is used {uses}")
        if self.skipped:
            lines.append("not shared:")
            lines += [f"  {name or '(the model)'}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """What a model shares, per layer: shape, virtual weights, ring segment, scale; and the rest.

    Args:
        model: a model with or without rpg layers, on any device.

    Raises:
        TypeError: model is not an nn.Module.

    Example:
        >>> import rpg_kernels as rpg
        >>> net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
        >>> s = summary(rpg.convert(net, rpg.RPGConfig(dof=1024)))
        >>> s.virtual_weights, s.dof, [layer.name for layer in s.layers]
        (4096, 1024, ['1'])
        >>> s.skipped["2"]
        'last layer (classifier), kept by the default rule'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, wanted an nn.Module")
    model = unwrap(model)
    banks: dict[int, ParameterBank] = {}
    names: dict[int, str] = {}
    seen: dict[tuple[int, str], str] = {}
    layers = []
    skipped: dict[str, str] = {}
    residuals: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, ParameterBank):
            banks.setdefault(id(module), module)
            names.setdefault(id(module), bank_name(module.group) if module.group else name)
        for bank in [] if isinstance(module, VirtualLayer) else banks_of(module).values():
            prefix = f"{name}." if name else ""
            skipped.update({prefix + key: why for key, why in bank.skipped.items()})
            residuals.update({prefix + key: value for key, value in bank.residuals.items()})
    for name, module in model.named_modules():
        if not isinstance(module, VirtualLayer):
            continue
        vw = module.virtual_weight
        if id(vw.bank) not in banks:
            banks[id(vw.bank)] = vw.bank
            names[id(vw.bank)] = bank_name(vw.bank.group)
        key = (id(vw.bank), vw.spec)
        reads = names[id(vw.bank)]
        layers.append(_layer(name, module, reads, seen.get(key, ""), residuals.get(name)))
        seen.setdefault(key, name)
    # Whatever they are called: pruning and parametrisations rename a bank's values.
    parameters = {id(p) for b in banks.values() for p in b.parameters()}
    label = {key: f"{names[key]}: " if len(banks) > 1 else "" for key in banks}
    idle = {key: why for key, bank in banks.items() if (why := _idle(bank))}
    return Summary(
        layers=tuple(layers),
        skipped=skipped,
        banks=tuple(f"{label[key]}{bank}" for key, bank in banks.items()),
        dof=sum(b.dof for b in banks.values()),
        virtual_weights=sum(x.virtual_weights for x in layers if not x.tied_to),
        unshared=sum(
            p.numel()
            for p in model.parameters()
            if p.requires_grad and id(p) not in parameters and not is_lazy(p)
        ),
        idle=tuple(f"{label[key]}{why}" for key, why in idle.items()),
    )


def _idle(bank: ParameterBank) -> str:
    """Why a part of a bank is never read; "" where all of it may be."""
    laps = getattr(bank.generator, "laps", None)
    placements = bank.map.placements
    if laps is None or not placements:
        return ""
    try:
        check_laps(laps, bank.dof, placements[-1].start + placements[-1].span)
    except ValueError as error:
        return f"slots of a bank that nothing reads; {error}"
    return ""


def _layer(
    name: str, module: VirtualLayer, reads: str, tied_to: str, residual: float | None
) -> LayerSummary:
    vw = module.virtual_weight
    p, bank = vw.placement, vw.bank
    return LayerSummary(
        name=name,
        kind=module.rpg_operator,
        shape=tuple(vw.shape),
        virtual_weights=vw.numel(),
        layer=p.layer,
        granularity=p.matrix.block,
        start=p.start,
        span=p.span,
        laps=p.span / bank.dof,
        scale=vw.scale,
        std=abs(vw.scale) * bank.init_std,
        residual=residual,
        tied_to=tied_to,
        window=getattr(bank.generator, "window", None),
        taps=p.taps,
        bank=reads,
    )
