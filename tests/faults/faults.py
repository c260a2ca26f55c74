"""The faults: where each is planted, what it makes of the code, and the tests that are to notice it.

Each one changes what the code does: none is the original in other words.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """One line of a module gone wrong."""

    name: str
    file: str
    original: str  # is there exactly once
    faulty: str
    tests: tuple[str, ...]  # node ids
    why: str = ""  # why no test can notice it, if so


def of(file: str, tests: str, planted: dict[str, tuple[str, ...]]) -> list[Fault]:
    """Faults of a module by name: the original, what it becomes, and other tests than the module's, if so."""
    found = []
    for name, (original, faulty, *others) in planted.items():
        found.append(Fault(name, file, original, faulty, tuple((others[0] if others else tests).split())))
    return found


OPERATORS, TRANSFORMS = "tests/ops/test_operators.py", "tests/ops/test_transforms.py"
VALUES, BAD_INPUT = "tests/ops/test_values.py", "tests/ops/test_bad_input.py::test_refused_with_one_clear_line"
DIFFERENCES, OPCHECK = f"{OPERATORS}::test_gradient_by_finite_differences", f"{OPERATORS}::test_opcheck"
BACKWARD_OPCHECK, HALF_OPCHECK = (
    f"{OPERATORS}::{name}" for name in ("test_backward_operator_opcheck", "test_opcheck_in_half_precision")
)
FLOPS = f"{TRANSFORMS}::test_flops {TRANSFORMS}::test_flops_are_those_of_plain_products"
FUNCTIONAL, PACKING, STATE = "tests/test_functional.py", "tests/test_packing.py", "tests/test_state.py"
REFERENCE, PACKED = f"{FUNCTIONAL}::test_equals_the_reference", f"{PACKING}::test_equals_the_reference"
GRADIENTS, STREAMING = f"{FUNCTIONAL}::test_gradients_equal_the_reference", f"{FUNCTIONAL}::test_streaming"
INDEX = "tests/test_log_index.py"
INDEX_SCAN = f"{INDEX}::test_a_scan_reads_the_index_as_it_reads_the_log"
KERNELS = "tests/kernels"

FAULTS = [
    *of(
        "fwpkm/ops/autocast.py",
        "tests/test_hosts_torch.py::test_the_meta_device_knows_the_shapes",
        {"meta-is-asked-of-autocast": ('kind != "meta" and torch.is', "torch.is")},
    ),
    *of(
        "fwpkm/ops/_batching.py",
        f"{TRANSFORMS}::test_vmap_equals_a_loop",
        {
            "a-slot-of-no-row-is-the-next-samples": (
                "(slots < n_slots), rows, -1)",
                "(slots <= n_slots), rows, -1)",
                f"{TRANSFORMS}::test_a_slot_of_no_row_is_refused",
            ),
            "batch-dimension-swapped-not-moved": ("x.movedim(dim, 0)", "x.transpose(dim, 0)"),
            "batch-and-memories-swapped": (
                "return folded, (info.batch_size, memories)",
                "return folded, (memories, info.batch_size)",
            ),
        },
    ),
    *of(
        "fwpkm/ops/_implementation.py",
        "tests/ops/test_implementation.py",
        {
            "cuda-runs-the-reference": ('"cuda": "triton"}', '"cuda": "reference"}'),
            "uninterpreted-kernels-on-a-cpu": (
                'os.environ.get("TRITON_INTERPRET") != "1"',
                'os.environ.get("TRITON_INTERPRET") == "0"',
            ),
            "values-checked-unless-told": (
                'return CHECKED == "1"',
                'return CHECKED != "0"',
                f"{KERNELS}/test_memory_read.py::test_values_are_checked_when_asked",
            ),
        },
    ),
    *of(
        "fwpkm/ops/checkpointing.py",
        "tests/compile/test_model.py::test_checkpointed_blocks",
        {
            "scans-of-keys-are-repeated": (', "product_key_scan")', ")"),
            "scans-of-values-are-kept": ('"product_key_scan")', '"product_key_scan", "memory_scan")'),
        },
    ),
    *of(
        "fwpkm/ops/_index.py",
        INDEX_SCAN,
        {
            "an-index-reads-the-first-memorys-residuals": (
                "    records += keys[rows] // log.n_slots * log.residuals.shape[1]\n",
                "",
            ),
            "place-past-the-last-sum": (
                ".clamp_max_(level.sum_keys.numel() - 1)",
                ".clamp_max_(level.sum_keys.numel())",
            ),
            "entries-from-the-end-of-a-row-on": (
                "(first - counts.cumsum(0) + counts)[rows]",
                "(first - counts.cumsum(0))[rows]",
            ),
            "an-index-of-any-slots": (
                "log.n_slots >= 1 and values.shape[0] % log.n_slots == 0",
                "log.n_slots >= 1",
                BAD_INPUT,
            ),
        },
    ),
    *of(
        "fwpkm/ops/_library.py",
        f"{OPERATORS}::test_autocast_changes_nothing",
        {
            "autocast-of-another-device": ("torch.is_autocast_enabled(kind)", 'torch.is_autocast_enabled("cuda")'),
            "forward-mode-at-the-first-level": (
                "forward_ad._current_level >= 0",
                "forward_ad._current_level > 0",
                f"{TRANSFORMS}::test_forward_mode_is_refused",
            ),
            "float64-given-to-kernels": (
                "require_dtype(name, x, torch.float32, torch.bfloat16, torch.float16)",
                "require_dtype(name, x, torch.float32, torch.bfloat16, torch.float16, torch.float64)",
                f"{KERNELS}/test_memory_read.py::test_kernels_compute_in_float32",
            ),
        },
    ),
    *of(
        "fwpkm/ops/_log.py",
        f"{VALUES}::test_scan_continues_from_a_log",
        {
            "a-record-too-many-writes": ("+ log.lookahead < log.lengths[", "+ log.lookahead <= log.lengths["),
            "a-record-too-many-is-counted": (
                "device=log.lengths.device) < log.lengths.unsqueeze(1)",
                "device=log.lengths.device) <= log.lengths.unsqueeze(1)",
            ),
            "residual-of-another-chunk": (
                "all_chunks[carriers.clamp_max(all_chunks.numel() - 1)] == chunks",
                "all_chunks[carriers.clamp_max(all_chunks.numel() - 1)] >= chunks",
            ),
            "last-chunk-of-a-row-is-first-of-the-next": (
                "(rows * (last - first + 1) + chunks - first)",
                "(rows * (last - first) + chunks - first)",
            ),
            "no-read-is-the-memory-befores": ("(log.slots >= 0), own, -1)", "(log.slots >= -1), own, -1)"),
        },
    ),
    *of(
        "fwpkm/ops/_rows.py",
        f"{VALUES}::test_write",
        {
            "coefficients-not-sorted": ("coefficients.reshape(-1)[segments.order]", "coefficients.reshape(-1)"),
            "tokens-of-entries-interleaved": (
                ".repeat_interleave(index.shape[1])",
                ".repeat(index.shape[1])",
            ),
            "vectors-not-sorted": (
                "Segments(rows, offsets, order, sources[order])",
                "Segments(rows, offsets, order, sources)",
            ),
        },
    ),
    *of(
        "fwpkm/ops/_selected.py",
        f"{VALUES}::test_key_commit",
        {
            "all-codebooks-are-the-first": ("(sub_slots + first).flatten(0, 1)", "sub_slots.flatten(0, 1)"),
            "sums-of-sub-keys-overwritten": ("out.index_add_(0, self.entries", "out.index_copy_(0, self.entries"),
        },
    ),
    *of(
        "fwpkm/ops/gated_delta_rule.py",
        "tests/ops/test_gated_delta_rule.py::test_rule_of_each_token",
        {
            "decays-summed-in-float32": (
                "decay.double(), beta)",
                "decay, beta)",
                "tests/ops/test_gated_delta_rule.py::test_float32_forgets_as_float64_does",
            ),
            "carried-from-the-chunks-start": (
                "(total, total[..., -1:] - total))",
                "(total, total[..., -1:].expand_as(total)))",
            ),
            "unit-vectors-have-no-projection": (
                "return scale * (grad - unit * (unit * grad).sum(-1, keepdim=True))",
                "return scale * grad",
                f"{DIFFERENCES}[0-gated_delta_rule]",
            ),
            "betas-gradient-without-the-state": (
                ".sub_(from_sides).add_(from_overlap.sum(-1))",
                ".add_(from_overlap.sum(-1))",
                f"{DIFFERENCES}[0-gated_delta_rule]",
            ),
            "last-decay-without-the-kept-state": (
                "from_carried.sum(-1) + self.since[..., -1] * (states * grad_after).sum((-1, -2))",
                "from_carried.sum(-1)",
                f"{DIFFERENCES}[0-gated_delta_rule]",
            ),
            "gradients-of-decay-and-beta-swapped": (
                "(grad_query, grad_key, beta * grad_sides, grad_decay, grad_beta)",
                "(grad_query, grad_key, beta * grad_sides, grad_beta, grad_decay)",
                f"{DIFFERENCES}[0-gated_delta_rule]",
            ),
            "heads-of-a-key-averaged": (
                "return rows.sum(2).movedim",
                "return rows.mean(2).movedim",
                f"{DIFFERENCES}[0-gated_delta_rule]",
            ),
            "an-empty-call-returns-its-input": (
                "state = state.clone()  # not the input itself",
                "pass",
                f"{OPCHECK}[contiguous-False-0-gated_delta_rule]",
            ),
            "a-token-corrects-before-it-forgets": (
                "state = state * rows.decay.to(state.dtype).exp().unsqueeze(-1)\n"
                "    residual = rows.value.baddbmm(rows.key, state, alpha=-1).mul_(rows.beta.unsqueeze(-1))",
                "residual = rows.value.baddbmm(rows.key, state, alpha=-1).mul_(rows.beta.unsqueeze(-1))\n"
                "    state = state * rows.decay.to(state.dtype).exp().unsqueeze(-1)",
            ),
        },
    ),
    *of(
        "fwpkm/ops/key_commit.py",
        f"{VALUES}::test_key_commit",
        {
            "idw-without-its-two": (
                "return gradient * sub_scores.exp() * 2 if",
                "return gradient * sub_scores.exp() if",
            ),
            "masked-pairs-of-one-head": (
                "pairs = mask.sum(1).to(probabilities.dtype) * heads",
                "pairs = mask.sum(1).to(probabilities.dtype)",
            ),
            "a-memory-without-tokens-divides-by-none": ("pairs = pairs.clamp_min(1)", "pairs = pairs.clamp_min(0)"),
            "masked-tokens-are-used": (
                "        probabilities = torch.where(mask[:, :, None, None, None], probabilities, 0.0)\n",
                "",
            ),
            "keys-pushed-away": ("step -= selected.sums()", "step += selected.sums()"),
            "keys-gradient-has-the-other-sign": ("grad_keys = grad + rate *", "grad_keys = grad - rate *"),
            "softmax-pull-not-centred": ("keepdim=True)) - inner * pull", "keepdim=True))"),
            "usages-gradient-without-the-second-term": (
                "(1 / shifted + ENTROPY_EPS / shifted.square())",
                "(1 / shifted)",
            ),
            "shared-keys-gradient-averaged": (
                "grad_keys = grad_keys.sum(0, keepdim=True)",
                "grad_keys = grad_keys.mean(0, keepdim=True)",
            ),
            "fake-of-shared-keys": (
                "return keys.new_empty((query.shape[0], *keys.shape[1:]))",
                "return keys.new_empty(keys.shape)",
                f"{OPCHECK}[contiguous-False-5-key_commit-shared]",
            ),
        },
    ),
    *of(
        "fwpkm/ops/log_read.py",
        "tests/ops/test_log_read.py::test_read tests/ops/test_log_read.py::test_chunks_are_counted_anew_from_an_origin",
        {
            "chunk-before-the-origin-goes-on": (
                "before = (origin + chunk_size - 1) // chunk_size",
                "before = origin // chunk_size",
            ),
            "an-uncommitted-residual-is-read": (
                "(carrier < lengths[reader])",
                "(carrier <= lengths[reader])",
                "tests/ops/test_log_read.py::test_lengths_that_cut_a_chunk",
            ),
            "uncommitted-records-match": ("(record < lengths[reader])", "(record <= lengths[reader])"),
            "a-block-too-many": ("counts = (lengths + page - 1) // page", "counts = lengths // page + 1"),
            "readers-collide": ("span = lengths.amax() + 1 if", "span = lengths.amax() if"),
            "filter-of-other-readers-slots": (
                "wanted.index_fill_(0, keys % n_slots & last_bits, True)",
                "wanted.index_fill_(0, keys & last_bits, True)",
            ),
            "padding-is-looked-at": ('require_no_nan("weights", weights[own])', 'require_no_nan("weights", weights)'),
            "padding-is-not-written": (
                "out = values.new_zeros(slots.shape[0], values.shape[1])",
                "out = values.new_empty(slots.shape[0], values.shape[1])",
            ),
            "reads-of-a-slot-not-counted": (
                "/ counts.repeat_interleave(counts)\n    carrier",
                "/ counts.repeat_interleave(counts).clamp_max(1)\n    carrier",
            ),
        },
    ),
    *of(
        "fwpkm/ops/memory_read.py",
        f"{DIFFERENCES}[0-memory_read]",
        {
            "fake-in-the-dtype-of-values": (
                "return weights.new_empty((*slots.shape[:-1], values.shape[1]))",
                "return values.new_empty((*slots.shape[:-1], values.shape[1]))",
                f"{HALF_OPCHECK}[memory_read-float16]",
            ),
            "samples-share-a-gradient-of-values": (
                "if in_dims[1] is not None or values_need_grad:",
                "if in_dims[1] is not None:",
                f"{TRANSFORMS}::test_vmap_equals_a_loop[gradients-0-memory_read]",
            ),
            "values-gradient-costs-nothing": (
                "return (4 if values_need_grad else 2) *",
                "return 2 *",
                f"{TRANSFORMS}::test_flops {TRANSFORMS}::test_flops_of_a_read_without_gradient_of_the_values",
            ),
            "values-gradient-by-the-weights": (
                "segment(index.reshape(-1), tokens), weights.to(values.dtype), vectors)",
                "segment(index.reshape(-1), tokens), grad_weights, vectors)",
            ),
            "a-slot-too-many": (
                'require_slots("slots", slots, values.shape[0])',
                'require_slots("slots", slots, values.shape[0] + 1)',
                BAD_INPUT,
            ),
        },
    ),
    *of(
        "fwpkm/ops/memory_scan.py",
        f"{DIFFERENCES}[0-memory_scan]",
        {
            "residuals-not-rounded": (
                ".to(dtype).to(gates.dtype).flatten(0, 1)",
                ".to(gates.dtype).flatten(0, 1)",
                f"{STATE}::test_bfloat16_records",
            ),
            "sequences-of-memories-overlap": (
                "device=slots.device) * n_sequences).view(-1, 1, 1)",
                "device=slots.device)).view(-1, 1, 1)",
                f"{PACKING}::test_packed_is_separate",
            ),
            "a-new-sequence-reads-the-index": (
                "torch.where(keys % per_memory < n_slots, own, -1)",
                "torch.where(keys % per_memory <= n_slots, own, -1)",
                INDEX_SCAN,
            ),
            "a-read-is-an-output-only": (
                "grad_read = grad_read - of_targets.flatten(0, 1)",
                "grad_read = grad_read",
            ),
            "rewinds-forward": (
                "add_to_rows_(working, segments, -coefficients[:, s], residuals)",
                "add_to_rows_(working, segments, coefficients[:, s], residuals)",
            ),
            "cut-a-chunk-late": ("            cut(s + 1)\n", "            cut(s)\n", GRADIENTS),
            "a-cut-spares-its-own-sequence": (
                "behind = owner % n_sequences <= optional.cut",
                "behind = owner % n_sequences < optional.cut",
                GRADIENTS,
            ),
            "log-gradient-not-divided": (
                "[matches.entries] = products / matches.counts",
                "[matches.entries] = products",
                f"{DIFFERENCES}[0-memory_scan-log]",
            ),
            "gates-gradient-by-the-gated-residual": (
                "(grad_residuals * error).sum(-1)",
                "(grad_residuals * residuals.view_as(error)).sum(-1)",
            ),
            "log-saved-for-one-of-two": (
                "ctx.needs_input_grad[7] or ctx.needs_input_grad[8]",
                "ctx.needs_input_grad[7]",
                f"{OPERATORS}::test_gradient_of_one_input_alone[memory_scan-log]",
            ),
            "padding-rows-of-samples-kept": (
                "device=rows.device) >= counts.unsqueeze(1)",
                "device=rows.device) > counts.unsqueeze(1)",
                f"{TRANSFORMS}::test_vmap_equals_a_loop",
            ),
            "the-last-chunk-writes-in-the-flops": ("max(steps - 1, 0) * chunk", "steps * chunk", FLOPS),
            "nan-gates-accepted": (
                '("weights", weights), ("targets", targets), ("gates", gates)):\n        require_no_nan',
                '("weights", weights), ("targets", targets)):\n        require_no_nan',
                BAD_INPUT,
            ),
            "fake-of-values-gradient-by-rows": (
                "rows.new_empty((n_slots, out.shape[-1]) if values_need_grad else 0)",
                "rows.new_empty(rows.shape if values_need_grad else 0)",
                f"{BACKWARD_OPCHECK}[memory_scan]",
            ),
        },
    ),
    *of(
        "fwpkm/ops/memory_write.py",
        BAD_INPUT,
        {
            "a-parameter-is-written": ("require(not values.requires_grad,", "require(True,"),
            "values-of-any-layout": (
                'require(values.is_contiguous(), "values.stride()", values.stride(), "contiguous values")',
                'require(values.dim() == 2, "values.stride()", values.stride(), "contiguous values")',
            ),
            "samples-write-by-width": (
                "slots = in_own_table(slots, values.shape[1])",
                "slots = in_own_table(slots, values.shape[2])",
                f"{TRANSFORMS}::test_write_under_vmap",
            ),
            "a-mutation-not-declared": (
                "memory_write_(Tensor(a!) values,",
                "memory_write_(Tensor values,",
                f"{OPERATORS}::test_write_opcheck {OPERATORS}::test_write_in_a_graph_is_in_place",
            ),
        },
    ),
    *of(
        "fwpkm/ops/product_key_address.py",
        f"{VALUES}::test_address",
        {
            "negative-distances": (
                ".clamp_min_(0)",
                ".clone()",
                f"{VALUES}::test_a_query_on_its_key_has_distance_zero",
            ),
            "gradient-has-the-other-sign": (
                "grad = grad * sub_scores.exp() * -2",
                "grad = grad * sub_scores.exp() * 2",
                f"{DIFFERENCES}[0-product_key_address]",
            ),
            "sub-scores-reach-the-query": (
                "of_rows = of_keys if sub_scores_reach_query else coefficients(of_scores)",
                "of_rows = of_keys",
                f"{VALUES}::test_sub_scores_that_do_not_reach_the_query",
            ),
            "the-last-row-of-a-block-left-out": (
                "range(0, max(rows, 1), size))",
                "range(0, max(rows - 1, 1), size))",
                f"{VALUES}::test_address_in_blocks",
            ),
            "memories-and-tokens-swapped": (
                'pattern = "(h c) (m p) k -> m p h c k" if shared else',
                'pattern = "(h c) (p m) k -> m p h c k" if shared else',
            ),
            "unbatched-keys-are-shared": (
                "shared = in_dims[1] is None and keys.shape[0] == 1",
                "shared = in_dims[1] is None",
                f"{TRANSFORMS}::test_vmap_over_any_inputs",
            ),
            "nan-among-the-best-accepted": (
                'require_no_nan("query or keys", sub_scores)  # a NaN',
                "assert sub_scores is not None  # a NaN",
                BAD_INPUT,
            ),
            "fake-in-the-dtype-of-the-query": (
                "return keys.new_empty(shape), slots, keys.new_empty(sub_shape), slots.new_empty(sub_shape)",
                "return query.new_empty(shape), slots, query.new_empty(sub_shape), slots.new_empty(sub_shape)",
                f"{HALF_OPCHECK}[product_key_address-bfloat16]",
            ),
            "norms-of-keys-not-squared": ("-keys.square().sum(-1).unsqueeze(1)", "-keys.sum(-1).unsqueeze(1)"),
        },
    ),
    *of(
        "fwpkm/ops/product_key_scan.py",
        f"{VALUES}::test_key_scan_is_address_and_commit_in_turn",
        {
            "every-chunk-has-the-first-mask": (
                "commit_chunk(query[:, s], versions[s], *found[2:], mask[:, s], rate, score)",
                "commit_chunk(query[:, s], versions[s], *found[2:], mask[:, 0], rate, score)",
            ),
            "sub-scores-have-no-gradient-of-their-own": (
                "        of_scores = of_scores + grad_sub_scores[:, s]\n",
                "",
            ),
            "keys-cut-a-chunk-late": (
                "grad.masked_fill(cut[:, s].view",
                "grad.masked_fill(cut[:, s - 1].view",
            ),
            "versions-of-samples-by-chunk": (
                "versions.unflatten(1, sizes).movedim(1, 0)), 0",
                "versions.unflatten(1, sizes).movedim(2, 0)), 0",
                f"{TRANSFORMS}::test_vmap_equals_a_loop",
            ),
            "commits-cost-nothing": ("2 * prod(query) * (keys[3] + k)", "2 * prod(query) * keys[3]", FLOPS),
        },
    ),
    *of(
        "fwpkm/ops/product_key_topk.py",
        f"{VALUES}::test_topk_with_ties",
        {
            "contested-places-stay": (
                "(values[:, k] == values[:, k - 1])",
                "(values[:, k] > values[:, k - 1])",
            ),
            "too-few-pairs": ("(rank + 1) <= k).nonzero()", "(rank + 1) <= k - 1).nonzero()"),
            "slots-by-k": ("first[position]) * n +", "first[position]) * k +"),
            "halves-swapped": (
                "torch.stack((slots // n, slots % n), dim=-2)",
                "torch.stack((slots % n, slots // n), dim=-2)",
                f"{DIFFERENCES}[0-product_key_topk]",
            ),
            "groups-of-neighbours": (
                "(torch.arange(_GROUP, device=x.device) * stride)",
                "(torch.arange(_GROUP, device=x.device) * _GROUP)",
                f"{VALUES}::test_topk_of_many_sub_keys",
            ),
            "fake-of-swapped-dimensions": (
                "slots.new_empty((*leading, 2, k))",
                "slots.new_empty((*leading, k, 2))",
                f"{OPCHECK}[contiguous-False-5-product_key_topk]",
            ),
            "k-beyond-the-sub-keys": (
                "require(1 <= k <= sub_scores.shape[-1]",
                "require(1 <= k <= sub_scores.shape[-1] + 1",
                BAD_INPUT,
            ),
        },
    ),
    *of(
        "fwpkm/ops/cuda/_log.py",
        f"{KERNELS}/test_memory_scan.py::test_scan",
        {
            "idle-entries-not-counted": ("for x in (key, key + idle)\n", "for x in (key,)\n"),
            "a-residual-past-the-lengths": ("writes = carrier < log.lengths", "writes = carrier <= log.lengths"),
            "gradients-of-the-record-itself": (
                "device=grad_rows.device) + log.lookahead",
                "device=grad_rows.device)",
            ),
            "coefficients-gradient-not-divided": (
                "return grad_coefficients.div_(matches.counts), grad_residuals",
                "return grad_coefficients, grad_residuals",
            ),
        },
    ),
    *of(
        "fwpkm/ops/cuda/_rows.py",
        f"{KERNELS}/test_memory_write.py::test_write",
        {
            "sources-modulo-fanout": ("order // index.shape[1])", "order % index.shape[1])"),
            "coefficients-as-they-came": (
                "coefficients.reshape(-1)[segments.order]",
                "coefficients.reshape(-1).contiguous()",
            ),
        },
    ),
    *of(
        "fwpkm/ops/cuda/_selected.py",
        f"{KERNELS}/test_key_commit.py::test_forward",
        {
            "heads-share-codebooks": (
                "torch.arange(0, codebooks * n, n, device=sub_slots.device)",
                "torch.arange(0, codebooks * n, n, device=sub_slots.device) % (2 * n)",
            ),
        },
    ),
    *of(
        "fwpkm/ops/cuda/gated_delta_rule.py",
        "tests/ops/test_gated_delta_rule.py::test_kernels_of_flash_linear_attention",
        {
            "kernels-take-vectors-as-they-are": ("use_qk_l2norm_in_kernel=True", "use_qk_l2norm_in_kernel=False"),
            "gradient-of-the-state-forgotten": (
                "wanted = leaves if start is None else [*leaves, start]",
                "wanted = leaves",
            ),
        },
    ),
    *of(
        "fwpkm/ops/cuda/key_commit.py",
        f"{KERNELS}/test_key_commit.py::test_forward {KERNELS}/test_key_commit.py::test_backward",
        {
            "pairs-of-one-head": ("max(tokens * heads, 1))", "max(tokens, 1))"),
            "heads-and-halves-swapped": (
                "return sums.view(memories, heads, 2, -1).sum(1)",
                "return sums.view(memories, 2, heads, -1).sum(2)",
            ),
            "products-with-the-moved-gradient": (
                "key_products = (keys * grad).sum(-1)",
                "key_products = (keys * grad_keys).sum(-1)",
            ),
            "no-pairs-no-floor": ("* heads).clamp_min(1)", "* heads).clamp_min(0)"),
        },
    ),
    *of(
        "fwpkm/ops/cuda/log_read.py",
        f"{KERNELS}/test_log_read.py",
        {
            "an-origin-makes-no-chunk": (
                "-(-capacity // chunk_size) + 1) if capacity",
                "-(-capacity // chunk_size)) if capacity",
                f"{KERNELS}/test_log_read.py::test_an_origin_makes_a_chunk_more",
            ),
            "turns-share-the-first-tokens": (
                "x[first : first + turn] for x in by_token",
                "x[:turn] for x in by_token",
            ),
        },
    ),
    *of(
        "fwpkm/ops/cuda/memory_read.py",
        f"{KERNELS}/test_memory_read.py::test_read_and_gradients",
        {
            "gradients-with-gaps": (
                "grad.reshape(-1, values.shape[1]).contiguous()",
                "grad.reshape(-1, values.shape[1])",
            ),
            "fake-outputs-in-float32": (
                "grad_weights = weights.new_empty(weights.shape)",
                "grad_weights = values.new_empty(weights.shape)",
                f"{KERNELS}/test_memory_read.py::test_opcheck_in_half_precision",
            ),
        },
    ),
    *of(
        "fwpkm/ops/cuda/memory_scan.py",
        f"{KERNELS}/test_memory_scan.py::test_scan",
        {
            "the-lowest-sequence-has-the-log": (
                "ascending.diff(prepend=ascending.new_zeros(1)) != 0",
                "ascending.diff(prepend=ascending[:1]) != 0",
                f"{KERNELS}/test_memory_scan.py::test_a_log_goes_with_sequence_0",
            ),
            "commits-done-twice": ("undo = -entries.sort(coefficients)", "undo = entries.sort(coefficients)"),
            "rows-cut-a-chunk-late": ("behind.zero_(grad_rows, s + 1)", "behind.zero_(grad_rows, s)"),
            "gates-gradient-unwritten": ("    grad_gates[:, -1:].zero_()\n", ""),
            "tokens-of-another-memory": (
                "return x.transpose(0, 1).flatten(1, 2).contiguous()",
                "return x.flatten(0, 1).unflatten(0, (x.shape[1], -1)).flatten(1, 2).contiguous()",
            ),
            "index-not-refused": (
                "require(index_residuals is None,",
                "require(True,",
                f"{KERNELS}/test_memory_scan.py::test_an_index_is_for_the_cpu",
            ),
        },
    ),
    *of(
        "fwpkm/ops/cuda/memory_write.py",
        f"{KERNELS}/test_memory_write.py",
        {
            "autograd-not-told": (
                "    torch.autograd.graph.increment_version(values)  # a kernel's writes are not seen by autograd\n",
                "",
            ),
            "residuals-with-gaps": ("residuals.contiguous())", "residuals)"),
        },
    ),
    *of(
        "fwpkm/ops/cuda/product_key_address.py",
        f"{KERNELS}/test_product_key_address.py::test_backward",
        {
            "kernels-sub-scores-reach-the-query": (
                "else coefficients(torch.zeros_like(grad_sub_scores))",
                "else coefficients(grad_sub_scores)",
            ),
            "sums-over-tokens-for-halves": (
                "torch.addcmul(-grad_halves, of_halves.sum(-1, keepdim=True), halves)",
                "torch.addcmul(-grad_halves, of_halves.mean(-1, keepdim=True), halves)",
            ),
        },
    ),
    *of(
        "fwpkm/ops/cuda/product_key_scan.py",
        f"{KERNELS}/test_product_key_scan.py::test_scan",
        {
            "mask-of-the-others": (
                "key_commit.forward, query, keys, mask, k,",
                "key_commit.forward, query, keys, ~mask, k,",
            ),
        },
    ),
    *of(
        "fwpkm/ops/cuda/product_key_topk.py",
        f"{KERNELS}/test_product_key_topk.py",
        {
            "sub-scores-with-gaps": (
                "sub_scores.reshape(-1, n).contiguous())",
                "sub_scores.reshape(-1, n))",
                f"{KERNELS}/test_product_key_topk.py::test_gaps_between_the_sub_scores_of_one_head",
            ),
            "gradients-not-zero-elsewhere": (
                "grad.new_zeros((*grad.shape[:-1], n))",
                "grad.new_empty((*grad.shape[:-1], n))",
            ),
        },
    ),
    *of(
        "fwpkm/ops/kernels/_best.py",
        f"{KERNELS}/test_product_key_topk.py",
        {
            "negative-zero-is-lower": (
                "bits = tl.where(x == 0, 0, x.to(tl.int32, bitcast=True))",
                "bits = x.to(tl.int32, bitcast=True)",
            ),
            "the-worst-two-are-replaced": (
                "better[:, None] & (best == worst[:, None])",
                "better[:, None] & (best <= worst[:, None] + 1)",
            ),
            "negative-numbers-rank-by-their-bits": (
                "monotone = bits ^ ((bits >> 31) & _LOW_BITS)",
                "monotone = bits",
            ),
        },
    ),
    *of(
        "fwpkm/ops/kernels/_forms.py",
        f"{KERNELS}/test_rows.py",
        {
            "odd-widths-cut-short": ("unit = min(width & -width, 16) or 1", "unit = min(width, 16) or 1"),
            "the-last-columns-have-no-program": ("-(-width // block)", "max(width // block, 1)"),
        },
    ),
    *of(
        "fwpkm/ops/kernels/_pieces.py",
        f"{KERNELS}/test_log_read.py",
        {
            "a-chunk-goes-over-the-origin": (
                "tl.where(is_before, origin, length))",
                "tl.where(is_before, length, length))",
            ),
            "pieces-by-length-alone": (
                "tl.cdiv(origin, chunk_size) + tl.cdiv(length - origin, chunk_size)",
                "tl.cdiv(length, chunk_size)",
            ),
            "lengths-beyond-the-pages": (
                "tl.minimum(tl.maximum(length, 0), capacity)",
                "tl.maximum(length, 0)",
            ),
        },
    ),
    *of(
        "fwpkm/ops/kernels/_usage.py",
        f"{KERNELS}/test_key_commit.py::test_forward",
        {
            "both-codebooks-are-the-first": ("((memory * 2 + row % 2) * n)", "((memory * 2) * n)"),
            "mask-of-another-token": (
                "row // (2 * heads), mask=row_counts",
                "row // (2 * heads) // 2, mask=row_counts",
            ),
            "softmax-of-what-is-not-there": (
                "exponential = tl.where(lane < k, tl.exp(shifted), 0.0)",
                "exponential = tl.exp(shifted)",
            ),
        },
    ),
    *of(
        "fwpkm/ops/kernels/combine_halves.py",
        f"{KERNELS}/test_product_key_topk.py::test_topk_with_ties",
        {
            "all-partners-advance": ("tl.where(chosen, partner + 1, partner)", "partner + 1"),
            "second-slots-of-the-first": (
                "tl.load(sub_slots + second_half + j,",
                "tl.load(sub_slots + first_half + j,",
            ),
        },
    ),
    *of(
        "fwpkm/ops/kernels/commit_coefficients.py",
        f"{KERNELS}/test_key_commit.py::test_forward",
        {
            "kernel-without-its-two": ("gradient *= 2 * tl.exp(score)", "gradient *= tl.exp(score)"),
            "pull-not-centred": ("p * (pull - tl.sum(p * pull, 1)[:, None])", "p * pull"),
        },
    ),
    *of(
        "fwpkm/ops/kernels/commit_score_gradient.py",
        f"{KERNELS}/test_key_commit.py::test_backward",
        {
            "pairs-divided-once": ("slope / pairs_of_row / pairs_of_row", "slope / pairs_of_row"),
            "own-gradient-taken-away": ("grad += g * p * centred", "grad -= g * p * centred"),
        },
    ),
    *of(
        "fwpkm/ops/kernels/commit_usage_gradient.py",
        f"{KERNELS}/test_key_commit.py::test_backward",
        {
            "rate-without-its-sign": ("g *= -rate", "g *= rate"),
            "products-with-keys-added": ("g -= tl.load(key_products", "g += tl.load(key_products"),
        },
    ),
    *of(
        "fwpkm/ops/kernels/joined_pieces.py",
        f"{KERNELS}/test_rows.py::test_segment_sum {KERNELS}/test_rows.py::test_hot_row_in_pieces_of_the_real_length",
        {
            "every-piece-joins": (
                "starts_here = (own == 0) | (before != target)",
                "starts_here = (own == 0) | (before <= target)",
            ),
            "the-next-piece-left-out": ("        piece = own + 1\n", "        piece = own + 2\n"),
        },
    ),
    *of(
        "fwpkm/ops/kernels/log_pieces.py",
        f"{KERNELS}/test_log_read.py::test_read {KERNELS}/test_log_read.py::test_chunks_of_many_steps",
        {
            "residual-of-the-next-chunk": (
                "block_table, request, carrier, carrier < end, max_blocks",
                "block_table, request, carrier, carrier <= end, max_blocks",
            ),
            "reads-not-counted": ("(weight / count)[None, :, None]", "weight[None, :, None]"),
            "the-last-hit-left-out": ("range(start, last_hit + 1, ROWS)", "range(start, last_hit, ROWS)"),
            "no-slot-matches-no-slot": ("tl.where(is_slot, wanted, -2)", "tl.where(is_slot, wanted, -1)"),
        },
    ),
    *of(
        "fwpkm/ops/kernels/log_total.py",
        f"{KERNELS}/test_log_read.py::test_read {KERNELS}/test_log_read.py::test_more_chunks_than_pieces",
        {
            "a-piece-too-many": ("tl.where(first + p < used, width, 0)", "tl.where(first + p <= used, width, 0)"),
            "padding-reads": (
                "own = tl.where((request >= 0) &",
                "own = tl.where((request >= -1) &",
                f"{KERNELS}/test_log_read.py::test_padding_reads_no_slot",
            ),
        },
    ),
    *of(
        "fwpkm/ops/kernels/row_products.py",
        f"{KERNELS}/test_rows.py",
        {
            "a-row-past-the-table": ("there = (row >= 0) & (row < rows)", "there = (row >= 0) & (row <= rows)"),
            "products-of-the-last-columns": (
                "            products += values * vector",
                "            products = values * vector",
            ),
        },
    ),
    *of(
        "fwpkm/ops/kernels/scan_cut.py",
        f"{KERNELS}/test_memory_scan.py::test_scan",
        {
            "the-kernel-spares-its-own-sequence": ("(sequence <= tl.load(cut", "(sequence < tl.load(cut"),
            "one-row-for-all": ("mask=behind[:, None] & inside", "mask=there[:, None] & inside"),
        },
    ),
    *of(
        "fwpkm/ops/kernels/scan_read.py",
        f"{KERNELS}/test_memory_scan.py::test_scan",
        {
            "residual-of-the-unrounded-read": (
                "(target - read.to(tl.float32))",
                "(target - tl.sum(sums, 0))",
                f"{KERNELS}/test_half_precision.py::test_as_the_cpu_operator",
            ),
            "chunks-of-the-first-memory": (
                "place = (token // tokens * steps + step) * tokens + token % tokens",
                "place = (token // tokens + step) * tokens + token % tokens",
            ),
        },
    ),
    *of(
        "fwpkm/ops/kernels/scan_write_backward.py",
        f"{KERNELS}/test_memory_scan.py::test_scan",
        {
            "reads-gradient-without-the-residuals": (
                "other=0.0).to(tl.float32) - grad_target\n",
                "other=0.0).to(tl.float32)\n",
            ),
            "gates-gradient-by-the-residual": (
                "of_gate += grad_residual * error",
                "of_gate += grad_residual * gate * error",
            ),
        },
    ),
    *of(
        "fwpkm/ops/kernels/segment_sum.py",
        f"{KERNELS}/test_rows.py::test_segment_sum {KERNELS}/test_rows.py::test_hot_row_in_pieces_of_the_real_length",
        {
            "pieces-without-a-beginning": ("((not goes_on_here) | (first % PIECE == 0))", "(not goes_on_here)"),
            "partial-sums-swapped": ("tl.where(goes_on_here, 0, 1)", "tl.where(goes_on_here, 1, 0)"),
            "a-piece-ends-late": (
                "end = tl.minimum((piece + 1) * PIECE, entries)",
                "end = tl.minimum((piece + 1) * PIECE + 1, entries)",
            ),
        },
    ),
    *of(
        "fwpkm/ops/kernels/select_scores.py",
        f"{KERNELS}/test_product_key_topk.py",
        {
            "zeros-past-the-end-compete": (
                "tl.where(counts, to_keys(found, position[None, :]), LOWEST)",
                "to_keys(found, position[None, :])",
            ),
        },
    ),
    *of(
        "fwpkm/ops/kernels/select_subkeys.py",
        f"{KERNELS}/test_product_key_address.py",
        {
            "kernels-negative-distances": (
                "tl.log(eps + tl.where(distance < 0, 0.0, distance))",
                "tl.log(eps + distance)",
            ),
            "products-once": ("products = 2 * products - norms", "products = products - norms"),
            "the-first-half-of-the-query": ("query_stride_h + c * d\n", "query_stride_h\n"),
        },
    ),
    *of(
        "fwpkm/ops/kernels/selected_gradient.py",
        f"{KERNELS}/test_product_key_topk.py::test_backward",
        {
            "the-kernel-swaps-halves": (
                "tl.where(row % 2 == 0, slot // n, slot % n)",
                "tl.where(row % 2 == 0, slot % n, slot // n)",
            ),
            "sub-scores-own-gradient-replaces": (
                "total += tl.load(grad_sub_scores",
                "total = tl.load(grad_sub_scores",
                f"{KERNELS}/test_product_key_address.py::test_backward",
            ),
        },
    ),
    *of(
        "fwpkm/ops/kernels/selected_softmax.py",
        f"{KERNELS}/test_key_commit.py",
        {
            "heads-are-tokens": (
                "heads, k = sub_scores.shape[2], sub_scores.shape[4]",
                "heads, k = sub_scores.shape[1], sub_scores.shape[4]",
            ),
        },
    ),
    *of(
        "fwpkm/ops/kernels/weighted_sum.py",
        f"{KERNELS}/test_rows.py",
        {
            "the-row-after-the-table": ("there = (row >= 0) & (row < rows)", "there = (row >= 0) & (row <= rows)"),
            "sums-of-the-last-tile": (
                "        sums += tl.where(there, weight",
                "        sums = tl.where(there, weight",
            ),
        },
    ),
    *of(
        "fwpkm/memory/appendable.py",
        f"{STATE}::test_a_fork_and_its_origin_go_their_own_ways",
        {
            "a-fork-writes-over-its-origin": (
                "return self.tip[0] == self.used and",
                "return self.tip[0] >= self.used and",
            ),
            "unshared-is-shared": ("self.used, [-1])\n\n    def append", "self.used, self.tip)\n\n    def append"),
            "no-room-to-grow": (
                "x.new_empty(x.shape[0], 2 * used,",
                "x.new_empty(x.shape[0], used,",
                f"{STATE}::test_appends_copy_each_record_a_few_times_only",
            ),
            "inserted-a-column-late": (
                "index = rows, at.unsqueeze(1) + torch.arange(width, device=at.device)",
                "index = rows, at.unsqueeze(1) + torch.arange(1, width + 1, device=at.device)",
                PACKED,
            ),
            "a-graph-is-written-over": (
                "any((torch.is_grad_enabled() and x.requires_grad) or is_transformed(x) for x in tensors)",
                "any(is_transformed(x) for x in tensors)",
                STREAMING,
            ),
        },
    ),
    *of(
        "fwpkm/memory/attribution.py",
        "tests/test_attribution.py",
        {
            "a-record-too-many-is-seen": (
                "slots * records + seen.unsqueeze(1))",
                "slots * records + seen.unsqueeze(1) + 1)",
            ),
            "strongest-are-the-largest": ("order = shares.abs().argsort(", "order = shares.argsort("),
            "shares-not-scaled": ("self.amounts * products * scale[self.readers]", "self.amounts * products"),
            "a-chunk-sees-itself": (
                "return torch.searchsorted(chunks, chunks)",
                "return torch.searchsorted(chunks, chunks, right=True)",
            ),
            "masked-states-are-split": ("require(not state.ragged, ", "require(True, "),
            "sources-met-twice": ("index_add_(0, place, terms)", "index_copy_(0, place, terms)"),
        },
    ),
    *of(
        "fwpkm/memory/changes.py",
        f"{STATE}::test_write_back",
        {
            "own-values-added": ("weights.values.copy_(self.values)", "weights.values.add_(self.values)"),
            "keys-not-written": ("weights.all_keys.copy_(self.keys)", "weights.all_keys.clone().copy_(self.keys)"),
        },
    ),
    *of(
        "fwpkm/memory/config.py",
        "tests/test_memory.py::test_bad_configuration",
        {
            "a-negative-lookahead": ('("lookahead", 0)', '("lookahead", -1)'),
            "a-temperature-of-zero": ("0, open=True)", "0)"),
            "cuts-every-zero": ("and every >= 1", "and every >= 0"),
        },
    ),
    *of(
        "fwpkm/memory/fast_weights.py",
        "tests/test_memory.py::test_bad_starting_point",
        {
            "values-of-another-dtype": (
                'require_dtype("values", self.values, keys.dtype)',
                'require_fast_weight_dtype("values", self.values)',
            ),
            "values-of-any-number": ("(keys.shape[3] ** 2,", '("N",'),
        },
    ),
    *of(
        "fwpkm/memory/forget.py",
        "tests/test_session.py",
        {
            "a-chunk-too-few": ("chunks[0, first]) + 1", "chunks[0, first])"),
            "later-chunks-keep-their-numbers": (", chunks - removed * later, gates", ", chunks, gates"),
            "the-origin-stays": ("origin=state.origin - (last - first)", "origin=state.origin"),
            "half-a-chunk-is-forgotten": (
                "require(not inside,",
                "require(True,",
                f"{STATE}::test_only_whole_chunks_are_forgotten",
            ),
        },
    ),
    *of(
        "fwpkm/memory/formulas.py",
        REFERENCE,
        {
            "reference-scale-of-any-chunk": (
                "return weights * (config.learning_rate * weights.shape[-1] * length / (length - lookahead))",
                "return weights * (config.learning_rate * weights.shape[-1])",
            ),
            "a-short-chunk-is-scaled": (
                "torch.where(length <= lookahead, 0.0,",
                "torch.where(length < lookahead, 0.0,",
                "tests/test_memory.py::test_relative_write_scale",
            ),
            "weights-of-twice-the-rate": (
                "coefficients * rate / torch.where(norm == 0, 1.0, norm)",
                "coefficients / rate / torch.where(norm == 0, 1.0, norm)",
                "tests/test_memory.py::test_weights_are_had_back_from_coefficients",
            ),
            "empty-usage-is-nan": ("(mean * (mean + ENTROPY_EPS).log())", "(mean * mean.log())"),
            "softmax-of-each-head": (
                "return scaled.softmax(-1)",
                "return (scores / config.temperature).softmax(-1).flatten(-2)",
            ),
            "training-rounds": (
                '"bfloat16" and not training else',
                '"bfloat16" else',
                f"{STATE}::test_bfloat16_records",
            ),
            "keys-commit-at-inference": (
                '(config.key_update == "train_only" and training)',
                '(config.key_update == "train_only")',
            ),
            "masked-tokens-use-sub-keys": (
                "        probabilities = torch.where(mask[..., None, None, None], probabilities, 0.0)\n",
                "        pass\n",
                PACKED,
            ),
            "chunks-counted-together": ("(slots + chunks.unsqueeze(-1) * n_slots)", "(slots + chunks.unsqueeze(-1))"),
        },
    ),
    *of(
        "fwpkm/memory/log_index.py",
        INDEX,
        {
            "indexed-residual-of-another-chunk": (
                "stored &= log.chunks[of_memory, carrier.clamp_max(log.chunks.shape[1] - 1)] == chunk",
                "stored &= log.chunks[of_memory, carrier.clamp_max(log.chunks.shape[1] - 1)] >= chunk",
            ),
            "levels-merged-without-weights": (
                "records, weights = records[order], weights[order]",
                "records = records[order]",
            ),
            "emptied-memories-are-covered": ("covered = torch.where(which, 0, self.covered)", "covered = self.covered"),
            "chosen-memories-keep-their-number": ("+ (memory - index[memory]) * n_slots", "+ memory * n_slots"),
            "the-last-chunk-of-a-key-collides": (
                "span = int(chunk.max()) + 1 if used",
                "span = int(chunk.max()) if used",
            ),
            "an-index-in-a-graph": ("if torch.compiler.is_compiling() or implementation", "if implementation"),
            "levels-never-merge": (
                "while levels and levels[-1].keys.numel() <",
                "while levels and levels[-1].keys.numel() >",
            ),
            "sums-kept-by-the-keys-of-entries": (
                "(level.keys, level.sum_keys))\n            return",
                "(level.keys, level.keys))\n            return",
            ),
        },
    ),
    *of(
        "fwpkm/memory/packing.py",
        PACKED,
        {
            "the-way-back-is-the-way-there": ("return order, order.argsort(dim=1)", "return order, order"),
            "one-token-early": (
                "torch.arange(kept.shape[1], device=count.device)",
                "torch.arange(kept.shape[1], device=count.device) - 1",
            ),
        },
    ),
    *of(
        "fwpkm/memory/state.py",
        f"{FUNCTIONAL}::test_flush",
        {
            "a-column-is-a-token": (
                "return self.committed + self.open_tokens * self.columns",
                "return self.committed + self.open_tokens",
                STREAMING,
            ),
            "chunks-count-from-the-old-origin": ("            origin=self.position,\n", ""),
            "a-short-chunk-has-the-full-scale": (
                "log=self.log.scale(self.per_memory(self.committed), relative_write_scale(self.config, tokens)),",
                "log=self.log,",
            ),
            "an-empty-chunk-is-a-commit": ("count.clamp(max=1) if", "torch.ones_like(count) if", PACKED),
            "masked-columns-commit-keys": (
                'if self.ragged or self.config.scope == "shared" else None',
                "if self.ragged else None",
                PACKED,
            ),
            "waiting-of-the-old-order": (
                "waiting=None if self.waiting is None else self.waiting[index]",
                "waiting=self.waiting",
                f"{STATE}::test_select",
            ),
            "the-open-chunks-first-record-lost": (
                "is_open = index >= self.per_memory(self.committed)",
                "is_open = index > self.per_memory(self.committed)",
                PACKED,
            ),
            "a-window-aligned-left": (
                "(0, 0) * (x.dim() - 2) + (kept - x.shape[1], 0)) for x in columns]",
                "(0, 0) * (x.dim() - 2) + (0, kept - x.shape[1])) for x in columns]",
                f"{PACKING}::test_a_mask_may_come_later",
            ),
            "folded-records-still-count": (
                "committed=self.committed - first,",
                "committed=self.committed,",
                f"{FUNCTIONAL}::test_a_long_log_folds_into_rows",
            ),
            "all-memories-have-the-firsts-values": (
                "offset = torch.arange(self.memories, device=slots.device) * self.n_slots",
                "offset = torch.arange(self.memories, device=slots.device)",
                f"{FUNCTIONAL}::test_a_long_log_folds_into_rows",
            ),
            "dense-values-in-place": (
                "else self.own_values.clone()",
                "else self.own_values",
                f"{FUNCTIONAL}::test_a_long_log_folds_into_rows {STATE}",
            ),
            "folded-ragged-records-not-moved": (
                "index = first.unsqueeze(1) + torch.arange(width, device=first.device)",
                "index = torch.zeros_like(first).unsqueeze(1) + torch.arange(width, device=first.device)",
                f"{INDEX}::test_reading_with_an_index_is_the_reference",
            ),
        },
    ),
    *of(
        "fwpkm/memory/state_file.py",
        f"{STATE}::test_save_and_load",
        {
            "no-checksum": (
                'checksum(tensors, metadata.get("state", "")))',
                'metadata.get("checksum", ""))',
                f"{STATE}::test_a_damaged_file_is_refused",
            ),
            "another-base-of-the-same-size": (
                "require(found == expected,",
                'require(found["values"] == expected["values"],',
                f"{STATE}::test_a_foreign_file_is_refused",
            ),
            "another-version": (
                "FORMAT, VERSION, checksum",
                'FORMAT, metadata.get("version"), checksum',
                f"{STATE}::test_another_version_is_refused",
            ),
            "what-is-behind-is-saved": (
                "torch.where(written.view(*written.shape, *(1,) * (x.dim() - 2)), x[:, :width], 0)",
                "x[:, :width]",
                f"{STATE}::test_memory_that_nobody_wrote_is_not_saved",
            ),
            "a-shared-lookahead-of-one-column": (
                "config.lookahead * columns) if records",
                "config.lookahead) if records",
            ),
            "own-values-not-saved": (
                "if state.own_values is not None:",
                "if state.own_values is not None and state.log is None:",
            ),
            "kept-queries-not-loaded": (
                "for i in range(3) if",
                "for i in range(2) if",
                "tests/test_half_precision.py::test_kept_queries_are_saved_and_continued",
            ),
        },
    ),
    *of(
        "fwpkm/memory/write_log.py",
        REFERENCE,
        {
            "a-residual-that-is-not-committed": (
                "stored = (index + self.lookahead < lengths.unsqueeze(1))",
                "stored = (index + self.lookahead <= lengths.unsqueeze(1))",
            ),
            "memories-count-each-others-reads": (
                "self.chunks.unsqueeze(-1), -1) * memory.numel() + memory.unsqueeze(-1)",
                "self.chunks.unsqueeze(-1), -1) + memory.unsqueeze(-1)",
            ),
            "cut-through-the-chunk-itself": (
                "old = (self.chunks < chunk.unsqueeze(1))",
                "old = (self.chunks <= chunk.unsqueeze(1))",
                STREAMING,
            ),
            "the-first-record-not-scaled": (
                "is_open = (index >= first.unsqueeze(1))",
                "is_open = (index > first.unsqueeze(1))",
                f"{FUNCTIONAL}::test_flush",
            ),
            "an-index-of-some-memories": (
                "(index.covered == lengths).all()",
                "(index.covered == lengths).any()",
                INDEX,
            ),
            "all-memories-write-to-the-first": (
                "slots = slots + (memory * n_slots).unsqueeze(-1)",
                "slots = slots + memory.unsqueeze(-1)",
            ),
        },
    ),
    *of(
        "fwpkm/functional/columns.py",
        REFERENCE,
        {
            "the-open-chunk-counts-in-tokens": (
                "- number(state.open_tokens) * state.columns, total)",
                "- number(state.open_tokens), total)",
                STREAMING,
            ),
            "padding-is-counted": (
                "label = torch.where(exists, label, memories * n_chunks)",
                "label = torch.where(exists, label, 0)",
                PACKED,
            ),
            "a-token-stores-its-own-target": (
                "targets = pad(run.target[:, :, size - stored :], (0, 0, 0, size - stored))",
                "targets = pad(run.target[:, :, :stored], (0, 0, 0, size - stored))",
            ),
            "the-first-chunk-is-cut": (
                "return (numbers % every == 0) & (numbers > 0)",
                "return numbers % every == 0",
                GRADIENTS,
            ),
            "a-calls-first-cut-is-late": (
                "if number(state.commits) >= every else -1",
                "if number(state.commits) > every else -1",
                STREAMING,
            ),
            "open-tokens-not-in-the-loss": (
                "pairs = pairs + (before[0].shape[1] if",
                "pairs = pairs + (0 if",
                f"{FUNCTIONAL}::test_losses_of_calls_are_those_of_one",
            ),
            "masked-targets-are-stored": (
                "torch.where(mask[:, :, start:], gates, 0.0)",
                "gates * 1.0",
                PACKED,
            ),
            "an-open-chunk-commits-keys": (
                "(whole if moving else 0)",
                "(n_chunks if moving else 0)",
            ),
            "the-loss-of-fixed-keys-moves-queries": (
                "*arguments, sub_scores_reach_query=moving)",
                "*arguments, sub_scores_reach_query=True)",
                GRADIENTS,
            ),
            "positions-of-all-columns": (
                "position=state.position + length // state.columns",
                "position=state.position + length",
                STREAMING,
            ),
            "masked-columns-are-recorded": (
                "recorded = slots if run.mask is None else torch.where(run.mask.unsqueeze(-1), slots, -1)",
                "recorded = slots",
                f"{PACKING}::test_masked_tokens_of_a_shared_memory_do_not_count",
            ),
            "waiting-of-the-whole-chunk": (
                "waiting = min(left, lookahead)",
                "waiting = left",
                STREAMING,
            ),
        },
    ),
    *of(
        "fwpkm/functional/fast_weight_memory.py",
        REFERENCE,
        {
            "masked-targets-are-somebodys": (
                "torch.where(mask[..., None], target, 0), torch.where(mask, gate, 0)",
                "target, torch.where(mask, gate, 0)",
                PACKING,
            ),
            "the-loss-reaches-moving-keys": (
                "else losses.mean().detach()",
                "else losses.mean()",
                f"{GRADIENTS} {PACKED} {REFERENCE}",
            ),
            "any-configuration-goes-on": (
                "require(config == state.config,",
                "require(config.topk == state.config.topk,",
                "tests/test_memory.py::test_a_state_is_continued_with_its_configuration_and_batch",
            ),
            "an-empty-chunk-has-a-loss": (
                "state.per_memory(state.open_tokens) > 0)",
                "state.per_memory(state.open_tokens) >= 0)",
                PACKED,
            ),
            "columns-read-as-rows": ('"1 (t b) d -> b t d", t=length', '"1 (b t) d -> b t d", t=length'),
        },
    ),
    *of(
        "fwpkm/functional/ragged.py",
        PACKED,
        {
            "cells-too-small-for-resets": ("else 2 * chunk_size - 1", "else chunk_size"),
            "numbers-of-a-new-sequence": (
                "torch.where(self.sequence == 0, state.per_memory(state.commits).unsqueeze(1), 0)",
                "state.per_memory(state.commits).unsqueeze(1)",
            ),
            "an-index-of-what-was-restarted": (
                "index = None if log.index is None else log.index.without(which)",
                "index = log.index",
                INDEX,
            ),
            "a-restart-keeps-folded-values": (
                "own = _where(which, state.base.values.expand_as(by_memory), by_memory).flatten(0, 1)",
                "own = _where(~which, state.base.values.expand_as(by_memory), by_memory).flatten(0, 1)",
                f"{PACKING}::test_a_row_restarts_after_its_log_was_folded",
            ),
            "targets-of-the-next-chunk": (
                "stores = layout.valid & ahead(layout.valid) & (ahead(layout.chunk) == layout.chunk)",
                "stores = layout.valid & ahead(layout.valid)",
            ),
            "memories-count-each-other": ("(chunk + 1) * state.memories + memory,", "(chunk + 1) * state.memories,"),
            "going-on-from-the-base": (
                "output = _where(sequences > 0, fresh, output)",
                "output = _where(sequences >= 0, fresh, output)",
                f"{PACKING}::test_a_row_restarts_after_its_log_was_folded",
            ),
            "a-full-chunk-has-base-keys": (
                "(tokens_of_last < config.chunk_size)",
                "(tokens_of_last <= config.chunk_size)",
            ),
            "waiting-gates-forgotten": (
                "arrived = before.waiting_gates[:, :first].unsqueeze(-1) * (",
                "arrived = (",
            ),
            "a-masked-end-is-complete": (
                "self.complete = self.valid & (end < length) & same",
                "self.complete = self.valid & (end < length)",
            ),
            "a-restarted-log-is-shared": (
                "records=log.records.unshared(), index=index",
                "records=log.records, index=index",
                f"{STATE}::test_a_fork_and_its_origin_go_their_own_ways",
            ),
            "rows-due-are-not-cut": (
                "due = cut[:, s] >= 0 if s else",
                "due = cut[:, s] > 0 if s else",
                f"{PACKING}::test_gradients_are_cut_where_each_row_is_due",
            ),
        },
    ),
    *of(
        "fwpkm/memory/trail.py",
        f"{STATE}::test_crop {STATE}::test_how_far_back_crop_goes",
        {
            "a-flush-is-not-taken-back": (
                "steps.append(step._replace(tensors=kept, flushed=False))",
                "steps.append(step._replace(tensors=kept))",
            ),
            "a-trail-begins-too-late": (
                "for i, behind in bounds if behind >= REACH), 0)",
                "for i, behind in bounds), 0)",
            ),
        },
    ),
    *of(
        "fwpkm/functional/tokens.py",
        PACKED,
        {
            "no-chunk-divides-by-none": ("self.count.clamp_min(1)", "self.count.clamp_min(0)", REFERENCE),
            "chunks-of-two-kinds": (
                "not state.has_open or kept == moving,",
                "not state.has_open or kept or not moving,",
                f"{FUNCTIONAL}::test_training_scope_of_key_commits",
            ),
        },
    ),
]
