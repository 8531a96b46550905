"""The table of checks: every method on every tiny family. A new method is one row of METHODS."""

import copy
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from families import CONFIGS, tiny, tokens
from rerail.compress.base import Compressor, Fitness, extended, make_plan
from rerail.compress.solvers import bases
from rerail.compress.solvers.bases import start
from rerail.compress.templates.narrower import micro_size
from rerail.distill.router_distillation import RouterDistillation
from rerail.distill.settings import RouterKD
from rerail.distill.trainable import master_copies
from rerail.errors import OutOfReach
from rerail.evaluate.fitness import plan_fitness
from rerail.experts.base import BankSpec, bank_class
from rerail.experts.encoded import EncodedExperts
from rerail.export.package import packaged_model
from rerail.methods.aimer import AIMER
from rerail.methods.camera import Camera
from rerail.methods.camera_q import CameraQ
from rerail.methods.cfes import CFES
from rerail.methods.conmoe import ConMoE
from rerail.methods.d2_moe import D2MoE
from rerail.methods.dern import DERN
from rerail.methods.easy_ep import EasyEP
from rerail.methods.eep import EEP
from rerail.methods.gptq import GPTQ
from rerail.methods.hc_smoe import HCSMoE
from rerail.methods.hqq import HQQ
from rerail.methods.m_smoe import MSMoE
from rerail.methods.merge_moe import MergeMoE
from rerail.methods.mobe import MoBE
from rerail.methods.mode_gpt import MoDeGPT
from rerail.methods.moe_i2 import InterExpert, IntraExpert, MoEI2
from rerail.methods.moe_svd import MoESVD
from rerail.methods.mone import MoNE
from rerail.methods.naee import NAEE
from rerail.methods.naee_skip import NAEESkip
from rerail.methods.odp import ODP
from rerail.methods.pmq import PMQ
from rerail.methods.puzzle_moe import PuzzleMoE
from rerail.methods.ream import REAM
from rerail.methods.reap import MomentScore
from rerail.methods.res_moe import ResMoE
from rerail.methods.rfid_moe import RFIDMoE
from rerail.methods.rtn import RTN
from rerail.methods.sub_moe import SubMoE
from rerail.methods.sub_moe_low_rank import SubMoELowRank
from rerail.methods.svd import WhitenedSVD
from rerail.methods.td_moe import TDMoE
from rerail.moe.model import MoELayer, MoEModel
from rerail.plan.allocation import Uniform
from rerail.plan.apply import apply_plan
from rerail.plan.budget import Bits, Budget, Ratio, Skip, dense_numbers, numbers_kept
from rerail.plan.plan import Plan
from rerail.plan.sizes import Sizes
from rerail.statistics.collect import collect
from rerail.statistics.statistic import LayerStatistics, StatisticSet
from rerail.teacher.hidden_states import LiveTeacher
from students import blocks

GOLDEN = Path(__file__).parent / "golden"


class ExactMoBE(MoBE):
    """MoBE where one basis an expert, of full rank, makes the start exact once alpha is one-hot."""

    def fit(self, stack: torch.Tensor, bases: int, rank: int) -> tuple[torch.Tensor, ...]:
        return start(stack, bases, rank)


class ExactRFID(RFIDMoE):
    """RFID-MoE where one basis a group, of full rank, makes the start exact."""

    def factor(self, *given: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                bases,
                "fit_many",
                lambda stacks, m, ranks, _: [
                    start(s, m, r) for s, r in zip(stacks, ranks, strict=True)
                ],
            )
            return super().factor(*given)


class ExactIntraExpert(IntraExpert):
    """The second stage with ranks beyond break-even, up to full rank."""

    def ranks(self, layer: MoELayer) -> Any:
        fixed, found = super().ranks(layer)
        full = min(layer.intermediate_size, layer.hidden_size)
        return fixed, {"rank": found["rank"]._replace(cap=full)}


def all_channels(layer: MoELayer) -> int:
    return layer.num_experts * layer.intermediate_size


def all_experts(layer: MoELayer) -> int:
    return layer.num_experts


def sixteen_bits(layer: MoELayer) -> int:
    return 16 * layer.num_experts


def no_limit(layer: MoELayer) -> int:
    return 10 * layer.expert_size * layer.num_experts


def all_bits(layer: MoELayer) -> int:
    return 16 * layer.expert_size * layer.num_experts


def none_skipped(layer: MoELayer) -> int:
    return 0


def all_but(*families: str) -> tuple[str, ...]:
    return tuple(family for family in CONFIGS if family not in families)


@dataclass(frozen=True)
class Method:
    """One row: how a method is built, a ratio for the tiny models, and what makes it exact.

    `capacity` gives the count of a layer at which nothing is lost, for `exact` where that is not
    the method itself. `unreachable` names the families that cannot reach the ratio; a preset of
    another row's class needs one family only.
    """

    name: str
    compressor: Compressor
    capacity: Callable[[MoELayer], int] = all_experts
    removed: float = 0.5
    exact: Compressor | None = None
    unreachable: frozenset[str] = field(default_factory=frozenset)
    families: tuple[str, ...] = tuple(CONFIGS)
    budget: Budget | None = None

    @property
    def asked(self) -> Budget:
        return self.budget or Ratio(self.removed)


_EXACT = {"bases": 8, "rank": "full", "activation": "identity"}
EXACT_RFID = ExactRFID(activation="identity", residual="none")
PMQ_16 = PMQ(quantiser=RTN(), bits=(1, 2, 3, 16))
METHODS = [
    Method("reap_slice", MomentScore()),
    Method("reap_mask", MomentScore(router="mask")),
    Method("reap_sequential", MomentScore(sequential=True), families=("qwen3_moe",)),
    Method("reap_guarded", MomentScore(guard="outliers"), families=("qwen3_moe",)),
    # flex_olmo has no norm before the block; half of lfm2_moe's tiny experts are never chosen, so
    # that nothing changes without them
    Method("easy_ep", EasyEP(), families=all_but("flex_olmo", "lfm2_moe")),
    Method("easy_ep_deep", EasyEP(), removed=0.75, families=("lfm2_moe",)),
    Method("aimer", AIMER()),
    Method("naee", NAEE(rows=96), families=all_but("lfm2_moe")),
    Method("naee_deep", NAEE(rows=96), removed=0.75, families=("lfm2_moe",)),
    Method("naee_greedy", NAEE(rows=96, limit=1), families=("qwen3_moe", "deepseek_v3")),
    Method("naee_sequence", NAEE(sequences=4), families=("qwen3_moe",)),
    Method("naee_progressive", NAEE(rows=96, sequential=True), families=("qwen3_moe",)),
    Method("cfes", CFES(segments=12, length=8)),
    Method("hc_smoe", HCSMoE()),
    Method(
        "hc_smoe_pooled",
        HCSMoE(router="pooled"),
        families=("gpt_oss", "deepseek_v3"),
        unreachable=frozenset({"deepseek_v3"}),
    ),
    Method("m_smoe", MSMoE()),
    Method("m_smoe_plain", MSMoE(similarity_of="rows", align="none"), families=("olmoe",)),
    Method("m_smoe_centroid", MSMoE(router="centroid"), families=("qwen3_moe", "deepseek_v3")),
    Method("merge_moe", MergeMoE(inputs=96)),
    Method(
        "merge_moe_gated",
        MergeMoE(inputs=96, tokens="gated", router="pooled"),
        families=("qwen3_moe", "deepseek_v3"),
    ),
    Method("sub_moe", SubMoE(rows=96)),
    Method("sub_moe_output", SubMoE(rows=96, kernel="output"), families=("qwen3_moe",)),
    Method("sub_moe_projected", SubMoE(rows=96, energy=0.9), families=("mixtral",)),
    Method(
        "sub_moe_low_rank",
        SubMoELowRank(merger=SubMoE(rows=96)),
        exact=SubMoELowRank(merger=SubMoE(rows=96), each=1e9),
        unreachable=frozenset({"gpt_oss"}),
    ),
    Method("ream", REAM(rows=96)),
    Method("ream_token", REAM(rows=96, outputs="token", align="none"), families=("mixtral",)),
    Method("ream_small", REAM(rows=96, size=2, sequential=False), families=("qwen3_moe",)),
    # segments of random experts are hardly alike: few would move at the paper's alpha
    Method("dern", DERN(alpha=0.1)),
    Method(
        "dern_scaled",
        DERN(alpha=0.1, init="magnitude", features="all", multiplicity="scaled"),
        families=("mixtral",),
    ),
    # half of lfm2_moe's tiny experts are never chosen, so that nothing changes without them
    Method(
        "eep",
        EEP(population=3, iterations=3, measure="esap"),
        families=all_but("lfm2_moe"),
    ),
    Method("eep_merge", EEP(population=3, iterations=3, merging=6), families=("mixtral",)),
    Method("mobe", MoBE(steps=20), no_limit, exact=ExactMoBE(**_EXACT)),
    Method(
        "mobe_paper",
        MoBE(matrices="gate+up", rank="full", steps=20),
        no_limit,
        removed=0.1,
        exact=ExactMoBE(matrices="gate+up", **_EXACT),
        unreachable=frozenset({"mixtral"}),
    ),
    Method("svd", WhitenedSVD(), no_limit),
    Method("svd_plain", WhitenedSVD(whiten=False), no_limit, families=("qwen3_moe",)),
    Method("svd_spectrum", WhitenedSVD(spread="spectrum"), no_limit, families=("mixtral",)),
    Method("moe_svd", MoESVD(), no_limit, exact=MoESVD(rows="stack")),
    Method("moe_svd_refit", MoESVD(rows="stack"), no_limit, families=("qwen3_moe",)),
    Method("d2_moe", D2MoE(), no_limit),
    Method("d2_moe_shared", D2MoE(rows="shared"), no_limit, families=("qwen3_moe",)),
    Method(
        "d2_moe_static",
        D2MoE(base_prune=0.2),
        no_limit,
        exact=D2MoE(weights="mean"),
        families=("qwen3_moe", "gpt_oss"),
    ),
    Method("td_moe", TDMoE(), no_limit),
    Method(
        "td_moe_output",
        TDMoE(whiten_output=True, expert_rank="search", iterations=2),
        no_limit,
        families=("qwen3_moe",),
    ),
    Method("res_moe", ResMoE(), no_limit),
    Method("res_moe_svd", ResMoE(kind="svd"), no_limit),
    Method("rfid_moe", RFIDMoE(steps=20), no_limit, exact=EXACT_RFID),
    Method(
        "rfid_moe_bases",
        RFIDMoE(bases=2, residual="none", steps=20),
        no_limit,
        exact=EXACT_RFID,
        families=("qwen3_moe",),
    ),
    Method("camera", Camera(), all_channels),
    Method("camera_sum", Camera(alpha=0), all_channels, families=("qwen3_moe",)),
    Method("mode_gpt", MoDeGPT(), all_channels),
    Method(
        "mode_gpt_influence",
        MoDeGPT(spread="influence", epsilon=0.1),
        all_channels,
        families=("qwen3_moe",),
    ),
    Method("moe_i2", MoEI2(first=InterExpert(rows=96)), no_limit, exact=ExactIntraExpert()),
    Method(
        "moe_i2_loss",
        MoEI2(first=InterExpert(rows=96, importance="loss"), second=IntraExpert(whiten=True)),
        no_limit,
        exact=ExactIntraExpert(whiten=True),
        families=("qwen3_moe",),
    ),
    Method("rtn", RTN(), sixteen_bits, budget=Bits(4)),
    Method("hqq", HQQ(), sixteen_bits, budget=Bits(3)),
    Method("gptq", GPTQ(), sixteen_bits, budget=Bits(2)),
    Method("pmq", PMQ(quantiser=GPTQ()), sixteen_bits, exact=PMQ_16, budget=Bits(2)),
    Method(
        "pmq_repo",
        PMQ(quantiser=GPTQ(inner="blocks"), exponents="repo"),
        sixteen_bits,
        exact=PMQ_16,
        budget=Bits(1.75),
        families=("qwen3_moe",),
    ),
    Method("puzzle_moe", PuzzleMoE()),
    Method("puzzle_moe_3bit", PuzzleMoE(store="codes"), families=("qwen3_moe", "gpt_oss")),
    Method(
        "camera_q",
        CameraQ(quantiser=GPTQ(group=8)),
        all_bits,
        exact=CameraQ(quantiser=RTN(), bits=(16,)),
        budget=Bits(6.5),
    ),
    Method(
        "camera_q_paper",
        CameraQ(quantiser=HQQ(), bits=(3, 2, 1)),
        all_bits,
        exact=CameraQ(quantiser=RTN(), bits=(16,)),
        budget=Bits(4),
        families=("qwen3_moe",),
    ),
    Method("conmoe", ConMoE()),
    Method("conmoe_output", ConMoE(distance="mean_output"), families=("qwen3_moe",)),
    # half of lfm2_moe's tiny experts are never chosen: MoNE finds them, and nothing changes
    Method("mone", MoNE(), removed=0.75),
    Method("mone_gate2", MoNE(novice="gate2_mean"), families=("qwen3_moe",)),
    Method("naee_skip", NAEESkip(), none_skipped, budget=Skip()),
    Method("naee_skip_half", NAEESkip(), none_skipped, budget=Skip(0.5), families=("olmoe",)),
    Method("odp", ODP(), none_skipped, budget=Skip(0.25)),
]
# what happens to a plan once it is made depends on its form, not on the method that made it: one
# method of each form meets all of its families, the others one family
FORMS = (
    *("reap_slice", "reap_mask", "hc_smoe", "hc_smoe_pooled", "m_smoe", "m_smoe_centroid"),
    *("merge_moe_gated", "mobe", "mobe_paper", "svd", "moe_svd", "d2_moe", "d2_moe_shared"),
    *("d2_moe_static", "td_moe", "res_moe", "res_moe_svd", "camera", "moe_i2", "rtn", "pmq"),
    *("rfid_moe", "mone", "naee_skip", "odp", "puzzle_moe", "puzzle_moe_3bit", "camera_q"),
)
PACKED = (
    "quantized",
    "puzzle",
    "packed_channels",
)  # codes stand for as many numbers as the expert has
CASES = [(method, family) for method in METHODS for family in method.families]
COUNTED = [
    m
    for m in METHODS
    if m.compressor.paradigm not in ("editing", "sequence")
    and m.compressor.budget is Ratio
    and not isinstance(m.compressor, SubMoELowRank)  # ranks use up what is between integers
    and m.name != "puzzle_moe_3bit"
]
REACHED = [(m, family) for m, family in CASES if family not in m.unreachable]
FIRST = [(method, next(f for m, f in REACHED if m is method)) for method in METHODS]
FORMED = [case for case in REACHED if case[0].name in FORMS or case in FIRST]


def table(cases: list[tuple[Method, str]]) -> pytest.MarkDecorator:
    ids = [f"{method.name}-{family}" for method, family in cases]
    return pytest.mark.parametrize(("method", "family"), cases, ids=ids)


@functools.cache
def filled(family: str) -> StatisticSet:
    """Return the statistics of all methods, collected once on three batches, one of them padded."""
    model, ids = tiny(family), tokens(9, 24)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[7:, 12:] = False
    batches = list(zip(ids.split(3), mask.split(3), strict=True))
    asked = [m.compressor for m in METHODS if family in (*m.families, "qwen3_moe")]
    return collect(model, batches, [s for compressor in asked for s in compressor.requires])


def plan_of(method: Method, family: str, removed: float | None = None) -> Plan:
    ratio = method.asked if removed is None else Ratio(removed)
    teacher = tiny(family)
    fitness = judge_of(method.compressor, teacher)
    statistics = filled(family)
    return make_plan(
        method.compressor, teacher.layers, statistics, ratio, Uniform(), fitness=fitness
    )


def judge_of(compressor: Compressor, teacher: MoEModel) -> Fitness | None:
    """Return what judges the students of a method that searches."""
    if compressor.judged_by is None:
        return None
    measure, count = compressor.judged_by
    return plan_fitness(teacher, blocks().first(count), measure, 8, list)


planned = functools.cache(plan_of)


def logits(model: MoEModel) -> torch.Tensor:
    with torch.no_grad():
        return model.model(tokens(2, 12, seed=5)).logits


def state_hash(model: MoEModel) -> str:
    found = hashlib.sha256(repr(model.config.to_dict()).encode())
    for name, tensor in model.model.state_dict().items():
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def of_experts(model: MoEModel) -> set[int]:
    """Return the ids of what may differ: experts, router rows and correction biases."""
    blocks = [(layer.experts, layer.router, layer.block) for layer in model.layers]
    deep = [p for experts, router, _ in blocks for m in (experts, router) for p in m.parameters()]
    return {id(p) for p in [*deep, *(p for _, _, b in blocks for p in b.parameters(recurse=False))]}


@table(FIRST)
def test_ratio_zero_is_the_empty_plan(method: Method, family: str) -> None:
    layers = tiny(family).layers
    plan = make_plan(method.compressor, layers, StatisticSet(), Ratio(0), Uniform())
    assert plan.layers == ()


@pytest.mark.parametrize("family", CONFIGS)
def test_the_empty_plan_is_bit_equal(family: str) -> None:
    teacher = tiny(family)
    assert torch.equal(logits(apply_plan(teacher, Plan())), logits(teacher))


def form_of(plan: Plan) -> set[tuple[object, ...]]:
    """Return what tells apply, banks and export how to treat the plan."""
    return {
        (
            *(part.bank.kind, part.router),
            *sorted(part.bank.integers),
            # not the hash of a router that a policy was fitted on
            *sorted((k, str(v)) for k, v in part.bank.options.items() if k != "router"),
            any(layer != part.layer for group in part.bank.members for layer, *_ in group),
        )
        for stage in plan.stages
        for part in stage.layers
    }


def test_every_form_meets_all_families() -> None:
    forms = {method.name: form_of(planned(method, family)) for method, family in FIRST}
    formed = [forms[name] for name in FORMS]
    assert {name for name, form in forms.items() if form not in formed} == set()


@table(CASES)
def test_a_capacity_plan_changes_nothing(method: Method, family: str) -> None:
    teacher, compressor = tiny(family), method.exact or method.compressor
    views = [filled(family).of(layer, compressor.requires) for layer in teacher.layers]
    counts = [method.capacity(layer) for layer in teacher.layers]
    plan = extended(Plan(), compressor.decide(teacher.layers, views, counts))
    student = apply_plan(teacher, plan)
    assert len(plan.layers) == len(teacher.layers)
    if all(part.bank.kind == "dense" for part in plan.layers):
        assert torch.equal(logits(student), logits(teacher))
    torch.testing.assert_close(logits(student), logits(teacher), atol=1e-4, rtol=1e-4)


@table(REACHED)
def test_compression_changes_the_logits_but_not_to_nonsense(method: Method, family: str) -> None:
    teacher = tiny(family)
    found = logits(apply_plan(teacher, planned(method, family)))
    assert torch.isfinite(found).all()
    assert (found - logits(teacher)).abs().max() > 1e-3


@table([(m, family) for m in METHODS for family in m.unreachable])
def test_a_ratio_out_of_reach_is_refused_before_planning(method: Method, family: str) -> None:
    with pytest.raises(OutOfReach, match="ratios from 0 to"):
        method.compressor.check(tiny(family).layers, Ratio(method.removed), Uniform())


@table(FIRST)
def test_a_plan_survives_text_and_disk(method: Method, family: str, tmp_path: Path) -> None:
    plan = planned(method, family)
    text = Plan.from_json(json.loads(json.dumps(plan.to_json())), plan.all_tensors())
    plan.save(tmp_path / "plan.json")
    disk = Plan.load(tmp_path / "plan.json")
    expected = logits(apply_plan(tiny(family), plan))
    for back in (text, disk):
        assert back == plan
        assert back.fingerprint() == plan.fingerprint()
        assert torch.equal(logits(apply_plan(tiny(family), back)), expected)


@table(FORMED)
def test_predicted_sizes_equal_counted_sizes(method: Method, family: str) -> None:
    teacher, plan = tiny(family), planned(method, family)
    student = apply_plan(teacher, plan)
    assert Sizes.predicted(teacher, plan, 2) == Sizes.of(student, 2)
    stored = sum(sum(layer.experts.stored().values()) for layer in student.layers)
    assert stored == Sizes.of(student, 2).routed
    if method.compressor.budget is Skip:
        assert stored == Sizes.of(teacher, 2).routed
    else:
        assert stored < Sizes.of(teacher, 2).routed


@table(FORMED)
def test_a_token_reads_no_more_than_the_teacher_and_edits_count_what_they_store(
    method: Method, family: str
) -> None:
    teacher, plan = tiny(family), planned(method, family)
    student = apply_plan(teacher, plan)
    rows = Sizes.of(teacher, 2).active - plan.rows_removed(teacher.layers)
    for layer in student.layers:
        bank = layer.experts
        if isinstance(bank, EncodedExperts) and bank.spec.kind not in PACKED:
            assert layer.used(bank.spec.stored) == pytest.approx(sum(layer.stored().values()))
        else:
            assert layer.used(1) == layer.expert_size
    forms = {part.bank.kind for part in plan.stages[-1].layers}
    if forms <= {"narrow", "low_rank"}:
        assert student.parameters_active() < rows
    elif not forms & {"delta", "basis", "tucker", "residual", "grouped_basis"}:
        # what all experts share, every token reads
        assert student.parameters_active() == rows


@table(REACHED)
def test_the_ratio_is_met_as_far_as_integers_allow(method: Method, family: str) -> None:
    teacher, plan = tiny(family), planned(method, family)
    before, after = Sizes.of(teacher, 2), Sizes.predicted(teacher, plan, 2)
    assert plan.lineage["achieved"] == pytest.approx(after.removed_of_experts(before), abs=1e-12)
    ranks = plan.stages[-1].layers[0].bank.kind == "low_rank"
    if method.compressor.paradigm in ("editing", "sequence") or ranks:
        allowed = sum(numbers_kept(dense_numbers(la), method.removed) for la in teacher.layers)
        slack = sum(quantum(method, plan, la) for la in teacher.layers)
        channels = plan.layers[0].bank.kind == "narrow"  # of these, what goes is rounded down
        assert after.routed < allowed + (slack if channels else 1)
        assert after.routed > allowed - slack
    elif plan.layers[0].bank.kind == "puzzle":  # whole pairs, of which biases are no part
        layer = teacher.layers[0]
        biases = 1 - 3 * layer.hidden_size * layer.intermediate_size / layer.expert_size
        one = method.compressor.saved(layer) / layer.num_experts
        assert (method.removed - one) * (1 - biases) < plan.lineage["achieved"] <= method.removed
    elif plan.layers[0].bank.kind == "packed_channels":
        layer = teacher.layers[0]
        matrices = 3 * layer.hidden_size * layer.intermediate_size * layer.num_experts
        biases = 16 * (dense_numbers(layer) - matrices)
        stored = plan.stored_bits([layer], 16) - biases
        channel = max(method.compressor.costs(layer).values())
        assert method.asked.average * matrices - channel < stored
        assert stored <= method.asked.average * matrices
    elif method.compressor.budget is Bits:
        for part in plan.layers:
            assert sum(part.bank.integers["bits"]) == method.asked.average * len(part.kept)
    elif method.compressor.budget is Skip:
        for layer, count in zip(teacher.layers, plan.lineage["counts"], strict=True):
            tails = filled(family).tensors[layer.index]["gate_tails"]
            share = 0.25 if method.asked.share is None else method.asked.share
            wanted = share * 2 * float(tails.sum())
            assert count == pytest.approx(wanted, abs=0.5 + float(tails.max()) / 2)
    else:
        removed = method.removed - novices(plan, teacher.layers)
        assert plan.lineage["achieved"] == pytest.approx(removed, abs=1e-12)


def novices(plan: Plan, layers: tuple[MoELayer, ...]) -> float:
    """Return the share of the experts' numbers that constants in their place cost."""
    banks = [part.bank for part in plan.layers if part.bank.kind == "novice"]
    cost = sum(b.stored - len(b.integers["kept"]) for b in banks) * layers[0].hidden_size
    return cost / sum(layer.expert_size * layer.num_experts for layer in layers)


def quantum(method: Method, plan: Plan, layer: MoELayer) -> int:
    """Return what one more unit (a rank, or the next number of bases) would have cost."""
    [part] = [p for p in plan.stages[-1].layers if p.layer == layer.index]
    if part.bank.kind == "narrow":
        uniform = getattr(method.compressor, "widths", "ragged") == "uniform"
        return micro_size(layer) * (layer.num_experts if uniform else 1)
    if part.bank.kind == "grouped_basis":
        m, size = part.bank.integers["bases"], method.compressor.group_size
        return size * layer.intermediate_size + m * layer.hidden_size
    if part.bank.kind == "tucker":
        each = [(*part.bank.integers[m], *side) for m, side in layer.dims.matrices.items()]
        return sum(max(a * b + inner, a * c + out) for a, b, c, out, inner in each)
    if part.bank.kind == "residual":
        low_rank = layer.intermediate_size + 3 * layer.hidden_size
        return layer.num_experts if "values" in part.bank.integers else low_rank
    if part.bank.kind in ("low_rank", "delta"):
        more = [one_rank_more(part.bank, layer, name) for name in ("gate", "up", "down")]
        return sum(more) if method.compressor.paradigm == "sequence" else max(more)
    (n, p, d, _), (m, r) = layer.dims, (part.bank.integers[k] for k in ("bases", "rank"))
    types = len(part.bank.options["matrices"].split("+"))
    more = m * (r * d + n) if "full" in repr(method.compressor) else n * p + m * d
    return types * (more + 1)


def one_rank_more(spec: BankSpec, layer: MoELayer, name: str) -> int:
    """Return what one more rank of a matrix stores."""
    now = spec.integers[name]
    more = {**spec.integers, name: (now[0] + 1, *now[1:]) if isinstance(now, tuple) else now + 1}
    wide, (a, b) = dataclasses.replace(spec, integers=more), (0, layer.dims)
    sizes = [sum(bank_class(s.kind).predicted(s, a, b).values()) for s in (wide, spec)]
    return sizes[0] - sizes[1]


@pytest.mark.parametrize("method", COUNTED)
def test_a_ratio_between_integers_is_rounded_down_and_reported(method: Method) -> None:
    plan = plan_of(method, "qwen3_moe", removed=0.3)
    assert plan.lineage["removed"] == 0.3
    removed = 2 / 8 - novices(plan, tiny("qwen3_moe").layers)
    assert plan.lineage["achieved"] == pytest.approx(removed, abs=1e-12)


@table(FORMED)
def test_top_k_distinct_selectable_slots_are_chosen(method: Method, family: str) -> None:
    student, plan = apply_plan(tiny(family), planned(method, family)), planned(method, family)
    chosen: dict[int, torch.Tensor] = {}
    for layer in student.layers:
        layer.experts.register_forward_pre_hook(
            lambda _, args, i=layer.index: chosen.update({i: args[1]})
        )
    logits(student)
    for part, layer in zip(plan.layers, student.layers, strict=True):
        assert len(part.kept) >= layer.top_k
        index = chosen[layer.index].sort(dim=1).values
        selectable = range(len(part.kept)) if part.router in ("slice", "pooled") else part.kept
        assert set(index.flatten().tolist()) <= set(selectable)
        assert index.shape[1] == 2
        assert (index[:, 1:] > index[:, :-1]).all()


@dataclass(frozen=True)
class Watched(StatisticSet):
    """Statistics that remember the views they gave."""

    views: list[LayerStatistics] = field(default_factory=list)

    def of(self, layer: MoELayer, required: Any) -> LayerStatistics:
        view = super().of(layer, required)
        self.views.append(view)
        return view


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_declared_statistics_are_read_statistics(method: Method) -> None:
    compressor, watched = method.compressor, Watched(filled("qwen3_moe").tensors)
    teacher = tiny("qwen3_moe")
    fitness = judge_of(compressor, teacher)
    make_plan(compressor, teacher.layers, watched, method.asked, Uniform(), fitness=fitness)
    read = [view.read for view in watched.views]
    assert set().union(*read) == set(compressor.requires)


@table(FORMED)
def test_all_experts_implementations_agree(method: Method, family: str) -> None:
    student = apply_plan(tiny(family), planned(method, family))
    student.model.set_experts_implementation("eager")
    eager = logits(student)
    for name in ("grouped_mm", "batched_mm"):
        student.model.set_experts_implementation(name)
        torch.testing.assert_close(logits(student), eager, atol=1e-5, rtol=1e-5)


@table(FORMED)
def test_a_second_apply_gives_the_same_student_and_leaves_the_teacher(
    method: Method, family: str
) -> None:
    teacher, plan = tiny(family), planned(method, family)
    before, spoken = state_hash(teacher), logits(teacher)
    first = apply_plan(teacher, plan)
    second = apply_plan(teacher, plan)
    assert state_hash(first) == state_hash(second)
    assert torch.equal(logits(first), logits(second))
    assert state_hash(teacher) == before
    assert torch.equal(logits(teacher), spoken)


@table(FORMED)
def test_parameters_stay_shared_objects_also_after_a_cast(method: Method, family: str) -> None:
    teacher = tiny(family)
    student = apply_plan(teacher, planned(method, family))
    differ = of_experts(student) | of_experts(teacher)
    names = [n for n, p in teacher.model.named_parameters() if id(p) not in differ]
    assert len(names) > 10
    for model in (None, student, teacher):
        if model is not None:
            model.model.to(torch.float64)
        for name in names:
            assert student.model.get_parameter(name) is teacher.model.get_parameter(name)
    assert student.model.get_parameter(names[0]).dtype == torch.float64


@table(FORMED)
def test_a_student_generates_and_lists_every_tensor_once(method: Method, family: str) -> None:
    student = apply_plan(tiny(family), planned(method, family)).model
    ids = tokens(1, 4)
    out = student.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_length=7)
    assert out.shape == (1, 7)
    named = dict(student.named_parameters(remove_duplicate=False))
    repeated = len(named) - len({id(p) for p in named.values()})
    assert repeated == int(bool(student.config.tie_word_embeddings))
    copied = copy.deepcopy(student)
    assert copied.load_state_dict(student.state_dict()).missing_keys == []


@table(FORMED)
def test_a_package_stores_what_was_counted_and_computes_the_same(
    method: Method, family: str
) -> None:
    student = apply_plan(tiny(family), planned(method, family))
    packaged = packaged_model(student)
    torch.testing.assert_close(logits(packaged), logits(student), atol=1e-6, rtol=1e-6)
    stored, counted = Sizes.of(packaged, 2), Sizes.of(student, 2)
    assert (stored.routed, stored.routed_bytes) == (counted.routed, counted.routed_bytes)


@table(FIRST)
def test_a_step_of_router_kd_changes_router_rows_only(method: Method, family: str) -> None:
    teacher, ids = tiny(family), tokens(2, 12, seed=6)
    student = apply_plan(teacher, planned(method, family))
    rows = {id(layer.router_rows): layer for layer in student.layers}
    names = {n for n, p in student.model.named_parameters() if id(p) in rows}
    before = {n: t.clone() for n, t in student.model.state_dict().items()}
    spoken = state_hash(teacher)
    with master_copies(student, "router_rows") as trained, torch.enable_grad():
        module = RouterDistillation(student, LiveTeacher(teacher), RouterKD(), trained, 1)
        mask = torch.ones_like(ids, dtype=torch.bool)
        module.loss({"input_ids": ids, "mask": mask, "index": torch.arange(2)}).backward()
        torch.optim.SGD(trained.values(), lr=10.0).step()
    after = student.model.state_dict()
    assert {n for n in after if not torch.equal(after[n], before[n])} == names
    assert len(names) == len(student.layers)
    assert state_hash(teacher) == spoken


def golden_of(plan: Plan) -> dict[str, Any]:
    """Return a plan's decisions, and the norm of each solved tensor."""
    layers = [layer for stage in plan.stages for layer in stage.to_json()["layers"]]
    for layer in layers:
        members = layer["bank"]["members"]
        layer["bank"]["members"] = [[[i, e, round(w, 6)] for i, e, w in g] for g in members]
    norms = {name: float(t.double().norm()) for name, t in plan.all_tensors().items()}
    return {"layers": json.loads(json.dumps(layers)), "norms": norms}


def read_golden(method: Method) -> dict[str, Any]:
    path = GOLDEN / f"{method.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_golden(method: Method, plans: dict[str, Any]) -> None:
    """Write the plans of a method, a line a layer, so that a change reads as one."""
    text = []
    for family in (f for m, f in REACHED if m is method and f in plans):
        layers = ",\n ".join(json.dumps(e, sort_keys=True) for e in plans[family]["layers"])
        norms = json.dumps(plans[family]["norms"], sort_keys=True)
        text.append(f'"{family}": {{"layers": [\n {layers}\n],\n"norms": {norms}}}')
    content = "{\n" + ",\n".join(text) + "\n}\n"
    (GOLDEN / f"{method.name}.json").write_text(content, encoding="utf-8")


@table(REACHED)
def test_the_plan_is_the_golden_one(method: Method, family: str, regenerate_golden: bool) -> None:
    found = golden_of(planned(method, family))
    if regenerate_golden:
        write_golden(method, {**read_golden(method), family: found})
    expected = read_golden(method)[family]
    assert found["layers"] == expected["layers"]
    assert found["norms"].keys() == expected["norms"].keys()
    for name, norm in found["norms"].items():
        assert math.isclose(norm, expected["norms"][name], rel_tol=1e-3), name


def test_every_golden_plan_has_its_row() -> None:
    names = {path.stem for path in GOLDEN.glob("*.json")} - {"dashboard"}
    assert names == {m.name for m in METHODS}
    assert [(m, family) for m in METHODS for family in read_golden(m)] == REACHED
