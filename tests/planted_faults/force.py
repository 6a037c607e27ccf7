"""Faults in the contrastive force."""

FORCE = "dist_contrastive/losses/force/"
ONE = "tests/test_force.py::"
EXTREMES = "tests/test_force_extremes.py::"
RANKS = "tests/test_force_ranks.py::"
KERNELS = "tests/test_force_kernels.py::"

FAULTS = [
    (
        "the force's weights are not rooted",
        FORCE + "affinity.py",
        "torch.where(x == -torch.inf, x, x / -2)",
        "torch.where(x == -torch.inf, x, -x)",
        (ONE + "test_force_is_the_seed",),
    ),
    (
        "positives push",
        FORCE + "passes.py",
        "sign = -1 if is_positive else 1",
        "sign = 1 if is_positive else -1",
        (ONE + "test_force_is_the_seed",),
    ),
    (
        "the sums over positives and negatives are exchanged",
        FORCE + "passes.py",
        "other = (sums.negative if is_positive else sums.positive)[:, *place]",
        "other = (sums.positive if is_positive else sums.negative)[:, *place]",
        (ONE + "test_force_is_the_seed",),
    ),
    (
        "half tiles of distances are counted once",
        FORCE + "passes.py",
        "times = 2 if is_halved or (one_block and tile.row_kind != tile.key_kind) else 1\n"
        "            if weights is None:",
        "times = 2 if one_block and tile.row_kind != tile.key_kind else 1\n"
        "            if weights is None:",
        (ONE + "test_seed_loss_and_gradient_through_the_scale",),
    ),
    (
        "the gradient of the scale ignores points as keys",
        FORCE + "passes.py",
        "both = 2.0 if weights is None",
        "both = 1.0 if weights is None",
        (ONE + "test_seed_loss_and_gradient_through_the_scale",),
    ),
    (
        "the square of an off-diagonal tile is counted once",
        FORCE + "passes.py",
        "squares + math.log(times)",
        "squares",
        (ONE + "test_force_is_the_seed",),
    ),
    (
        "points that coincide are forgotten in log-sum-exps",
        FORCE + "sums.py",
        "by_rows = _with_coinciding(by_rows, coinciding)",
        "pass",
        (EXTREMES + "test_weights_of_many_sizes",),
    ),
    (
        "a point is not in its own softmax for seed",
        FORCE + "sums.py",
        "-torch.inf if rules.mask_self else 0.0",
        "-torch.inf",
        (ONE + "test_force_is_the_seed",),
    ),
    (
        "columns are normalised by the sums of all rows",
        FORCE + "affinity.py",
        "return [side for side, kind in enumerate((row_kind, key_kind)) if kind == GENERATED]",
        "return [0, 1] if row_kind == GENERATED else []",
        (ONE + "test_paper_is_the_published_code",),
    ),
    (
        "the diagonal is not left out",
        FORCE + "points.py",
        "same = None if self.own_index is None else self.own_index[:, None] == self.key_index",
        "same = None",
        (ONE + "test_force_is_the_seed", EXTREMES + "test_weights_of_many_sizes"),
    ),
    (
        "labels do not keep points apart",
        FORCE + "points.py",
        "if x.label == keys.label and wanted",
        "if wanted",
        (ONE + "test_options",),
    ),
    (
        "a temperature is taken for a power of another that is nearly a multiple",
        FORCE + "affinity.py",
        "abs(ratio - round(ratio)) < 1e-9 * ratio",
        "abs(ratio - round(ratio)) < 0.4",
        (EXTREMES + "test_exponentials",),
    ),
    (
        "a power is overwritten while it is needed",
        FORCE + "affinity.py",
        "free = [k for k in factors or () if k not in later]",
        "free = list(factors or ())",
        (EXTREMES + "test_exponentials",),
    ),
    (
        "exponentials underflow where a tile is far",
        FORCE + "affinity.py",
        "for x in (largest - lowest, log_shift, exponent))",
        "for x in (largest - lowest, log_shift))",
        (EXTREMES + "test_fp32_is_near_fp64",),
    ),
    (
        "differences of close points are computed in fp32",
        FORCE + "points.py",
        "    if has_close:\n        wide",
        "    if False:\n        wide",
        (EXTREMES + "test_sums_of_close_points_keep_their_digits",),
    ),
    (
        "a rank's unit is its own",
        FORCE + "sums.py",
        "total = collectives.logsumexp_over_ranks(total, self.group)",
        "pass",
        (RANKS + "test_ranks_find_what_one_process_finds[2]",),
    ),
    (
        "the scale has no gradient",
        FORCE + "loss.py",
        "scale_gradient=True,",
        "scale_gradient=False,",
        (ONE + "test_seed_loss_and_gradient_through_the_scale",),
    ),
    (
        "drift has gradients through the scale",
        FORCE + "spec.py",
        "(scale if scale_gradient else scale.detach()) / order",
        "scale / order",
        (ONE + "test_the_specification_is_the_literal_form",),
    ),
    (
        "the specification counts a point's own weight",
        FORCE + "spec.py",
        "masked_fill(~in_softmax | own, -torch.inf)",
        "masked_fill(~in_softmax, -torch.inf)",
        (ONE + "test_the_specification_is_the_literal_form",),
    ),
    (
        "no data are needed",
        FORCE + "inputs.py",
        "if m < 1 or n < 1:",
        "if m < 1:",
        (RANKS + "test_bad_points_are_refused_on_all_ranks_in_the_same_words",),
    ),
    (
        "labels are numbered by each rank",
        FORCE + "inputs.py",
        "all_labels = collectives.gather_rows(all_labels, sizes, group)",
        "pass",
        (RANKS + "test_ranks_find_what_one_process_finds[2]",),
    ),
    (
        "a thread's sums of weights are not seen from its new largest",
        FORCE + "sum_kernels.py",
        "total = total * shrinks_by + tl.sum(e, 2)",
        "total = total + tl.sum(e, 2)",
        (KERNELS + "test_tiles_one_after_the_other[drift]",),
    ),
    (
        "pairs that are near are in the product, too",
        FORCE + "weight_kernels.py",
        "weight = tl.where(weight < 0, 0.0, weight)  # NaN stays",
        "weight = tl.where(weight < 0, -weight, weight)",
        (KERNELS + "test_sums_of_close_points_keep_their_digits",),
    ),
    (
        "panels of the force are small",
        FORCE + "panels.py",
        "_PANEL = 2**31",
        "_PANEL = 2**29",
        (KERNELS + "test_no_waits_and_few_launches_at_full_size[paper-True]",),
    ),
]
