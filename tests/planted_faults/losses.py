"""Faults in losses, pair reductions and collectives."""

LOSSES = "dist_contrastive/losses"
PAIRWISE = "dist_contrastive/pairwise"
COLLECTIVES = "dist_contrastive/collectives"
TESTS = "tests/test_collectives.py::test"
GATHER = f"{TESTS}_gather_rows_and_sum_of_gradients[dtype0-sizes1]"
SHORT = "tests/test_pairwise.py::test"

FAULTS = [
    (
        "a bank of keys does not count",
        f"{LOSSES}/infonce.py",
        "return torch.logaddexp(row_lse.double(), bank_lse.double()).to(row_lse.dtype)",
        "return row_lse",
        ("tests/test_objectives.py::test_infonce_with_a_bank[7-None-False-options0]",),
    ),
    (
        "symmetric InfoNCE is twice as large",
        f"{LOSSES}/infonce.py",
        "row_lse = (row_lse + key_lse[0][: len(queries)]) / 2",
        "row_lse = row_lse + key_lse[0][: len(queries)]",
        ("tests/test_losses.py::test_published_values",),
    ),
    (
        "an embedding is its own negative",
        f"{LOSSES}/ntxent.py",
        'LogSumExp(leave_out="own")',
        "LogSumExp()",
        ("tests/test_losses.py::test_published_values",),
    ),
    (
        "DCL keeps the positive in the denominator",
        f"{LOSSES}/dcl.py",
        'LogSumExp(leave_out="similar")',
        'LogSumExp(leave_out="own")',
        ("tests/test_objectives.py::test_measured_values",),
    ),
    (
        "the covariance is that of a population",
        f"{LOSSES}/vicreg.py",
        "/ (num_rows - 1)",
        "/ num_rows",
        ("tests/test_objectives.py::test_measured_values",),
    ),
    (
        "rows without a positive count in the mean",
        f"{LOSSES}/supcon.py",
        "return self.mean(torch.where(has_positive, loss, 0.0).sum(), has_positive.sum())",
        "return self.mean(torch.where(has_positive, loss, 0.0).sum(), len(loss))",
        ("tests/test_objectives.py::test_formula_with_labels",),
    ),
    (
        "samples with missing labels are similar",
        f"{LOSSES}/supcon.py",
        "torch.where(labels == -1, -2 - number, labels)",
        "torch.where(labels == -1, -2, labels)",
        ("tests/test_objectives.py::test_formula_with_labels",),
    ),
    (
        "a learnable scale stays beyond its limit",
        f"{LOSSES}/scale.py",
        "self.log_scale.clamp_(*map(math.log, SCALES))",
        "self.log_scale.clamp_(math.log(SCALES[0]))",
        ("tests/test_objectives.py::test_a_learnable_scale_is_brought_back",),
    ),
    (
        "a run compares no ranks",
        f"{LOSSES}/base.py",
        'if self.keys_from == "local":\n                raise ValueError',
        'if self.keys_from == "locals":\n                raise ValueError',
        ("tests/test_objectives.py::test_local_keys_are_for_python_alone",),
    ),
    (
        "the views of a sample are compared once too little",
        f"{LOSSES}/views.py",
        "for i in range(num_global) for j in range(i + 1, num_views)",
        "for i in range(num_global) for j in range(i + 1, max(2, num_views - 1))",
        ("tests/test_loss_views.py::test_every_pair_has_a_global_view",),
    ),
    (
        "tiles of a block have the first tile's keys as their own",
        f"{PAIRWISE}/tiles.py",
        "pairs.tile(r, block.first + k.start, block.keys[k], tags)",
        "pairs.tile(r, block.first, block.keys[k], tags)",
        (f"{SHORT}_chunked_equals_dense",),
    ),
    (
        "gradients of keys lack those by the rows",
        f"{PAIRWISE}/tiles.py",
        "grads.keys[k].addmm_(grad_scores.T, pairs.rows[r])",
        "grads.keys[k] = grad_scores.T @ pairs.rows[r]",
        (f"{SHORT}_chunked_equals_dense",),
    ),
    (
        "sums of exponentials lose their digits",
        f"{PAIRWISE}/reductions.py",
        "if min(x.min() for x in sums) > _LEAST_SUM[scores.dtype]:",
        "if min(x.min() for x in sums) >= 0:",
        (f"{SHORT}_chunked_equals_dense", f"{SHORT}_rows_of_very_different_scale"),
    ),
    (
        "one exponential spans all scores",
        f"{PAIRWISE}/reductions.py",
        "_MOST_SPREAD = 30.0",
        "_MOST_SPREAD = 3000.0",
        (f"{SHORT}_chunked_equals_dense", f"{SHORT}_rows_of_very_different_scale"),
    ),
    (
        "triplets that keep the margin are active",
        f"{PAIRWISE}/triplets.py",
        "reach, columns, is_real = _sorted_positives(d + margin, positive)",
        "reach, columns, is_real = _sorted_positives(d + 2 * margin, positive)",
        ("tests/test_objectives.py::test_formula_with_labels",),
    ),
    (
        "keys of later tiles have the numbers of the first",
        f"{PAIRWISE}/nearest.py",
        "number = at + first",
        "number = at",
        ("tests/test_objectives.py::test_formula_with_labels",),
    ),
    (
        "the mean is over this rank's elements",
        f"{COLLECTIVES}/reductions.py",
        'factor = world_size(group) if grad_reduction == "mean" else 1',
        "factor = 1",
        ("tests/test_loss_views.py::test_the_gradient_contract_holds[gather]",),
    ),
    (
        "gradients in low precision are summed in it",
        f"{COLLECTIVES}/rows.py",
        "        grad = grad.to(accumulation_dtype(grad.dtype))\n",
        "",
        (f"{TESTS}_gradients_in_low_precision_are_summed_in_fp32",),
    ),
    (
        "padding stays among gathered rows",
        f"{COLLECTIVES}/rows.py",
        "[block[:size] for block, size in zip(blocks, sizes, strict=True)]",
        "[block for block, size in zip(blocks, sizes, strict=True)]",
        (GATHER,),
    ),
    (
        "the offset counts this rank's own rows",
        f"{COLLECTIVES}/rows.py",
        "sum(sizes[: rank(group)])\n\n\ndef gather_rows",
        "sum(sizes[: rank(group) + 1])\n\n\ndef gather_rows",
        (GATHER,),
    ),
    (
        "gradients of a sum over ranks stay on theirs",
        f"{COLLECTIVES}/reductions.py",
        "return all_reduce_sum(grad, ctx.group), None",
        "return grad, None",
        (f"{TESTS}_sum_over_ranks_sums_the_gradients_of_all_sums",),
    ),
    (
        "rows that overflow when squared pass",
        f"{COLLECTIVES}/headers.py",
        "return (~(largest <= limit)).sum()",
        "return (~(largest < torch.inf)).sum()",
        ("tests/test_refusals.py",),
    ),
    (
        "inputs of one rank with different rows pass",
        f"{COLLECTIVES}/schema.py",
        "        if len(set(sizes.values())) <= 1:",
        "        if len(set(sizes.values())) <= 2:",
        ("tests/test_objectives.py::test_bad_input_is_one_sentence",),
    ),
]
