"""Bugs of what is said of a model: scores, naive baselines, probe, fine-tuning, export."""

from __future__ import annotations

from planted.lane import bugs

# fmt: off
EVALUATION = [
    *bugs(
        "maesil/evaluation/evaluate.py", "evaluation/test_evaluate.py",
        ("ssim(reference, pasted, window", "ssim(reference, predicted, window",
         "test_what_is_put_out_where_the_model_saw_counts_in_the_score_of_all_voxels_alone"),
        ("seen = {*split.train, *(", "seen = {*(", "test_a_copy_of_a_training_scan_under_another_group_is_not_scored"),
    ),
    *bugs(
        "maesil/evaluation/metrics.py", "evaluation/test_metrics.py",
        ("error = clip(predicted_ZYX[region_ZYX], self.window) - clip(reference",
         "error = predicted_ZYX[region_ZYX] - clip(reference",
         "test_error_sums_are_numpy_in_float64"),
        ("return psnr(self.hidden_squared, self.voxels, self.window)",
         "return psnr(self.hidden_squared, self.hidden_voxels, self.window)",
         "test_error_sums_are_numpy_in_float64"),
        ("border, seam = after % self.patch == 0", "border, seam = after % self.patch == 1",
         "test_border_ratio_of_a_known_grid"),
        ("pairs = counted_ZYX.narrow(axis, 0, size - 1) & ", "pairs = counted_ZYX.narrow(axis, 0, size - 1) | ",
         "test_border_ratio_needs_both_sides"),
        ("valid & (body_cells >= BODY_SHARE)", "body_cells >= BODY_SHARE", "test_regions_come_from_the_maps"),
        ("valid = valid_cells == 255", "valid = valid_cells > 0", "test_regions_come_from_the_maps"),
        ("x, y = x * weight, y * weight", "x, y = x, y", "test_voxels_outside_the_scan_change_no_score[False]"),
        ("chosen = counts >= patch**3 / 2", "chosen = counts > 0", "test_patch_rmse_of_known_errors"),
        ("c1, c2 = SSIM_K1**2, SSIM_K2**2", "c1, c2 = SSIM_K1, SSIM_K2", "test_ssim_map_is_scikit_images[True]"),
    ),
    *bugs(
        "maesil/evaluation/scores.py", "evaluation/test_scores.py",
        ("above < volume.source_spacing[0] <= up_to", "above <= volume.source_spacing[0] < up_to",
         "test_the_thickness_group_is_that_of_the_scanner_s_slices_and_not_of_the_store_s"),
        ("above < volume.source_spacing[0]", "above < volume.spacing[0]",
         "test_the_thickness_group_is_that_of_the_scanner_s_slices_and_not_of_the_store_s"),
    ),
    *bugs(
        "maesil/evaluation/intervals.py", "evaluation/test_intervals.py",
        ("ours[patient] - theirs[patient]", "theirs[patient] - ours[patient]",
         "test_what_makes_a_patient_hard_for_both_cancels_out"),
        ("[2.5, 97.5]", "[5, 95]", "test_the_interval_is_that_of_scipy"),
    ),
    *bugs(
        "maesil/evaluation/naive.py", "evaluation/test_naive.py",
        ("visible = (masks.mask == 0)", "visible = (masks.mask >= 0)",
         "test_the_mean_baseline_is_the_mean_of_the_visible_valid_voxels"),
        ("known if valid_BZYX is None else known & valid_BZYX", "known",
         "test_the_mean_baseline_is_the_mean_of_the_visible_valid_voxels"),
        ("((tension + degree) * bend).sub_(_neighbour_sum(bend))", "(tension * bend)",
         "test_solution_equals_a_direct_sparse_solve[3]"),
        ("near = 0.75 * cells_BZYX", "near = 0.5 * cells_BZYX", "test_restriction_is_the_transpose_of_prolongation"),
    ),
    *bugs(
        "maesil/evaluation/predict.py", "evaluation/test_evaluate.py",
        (":{origin[0]}:{origin[1]}:{origin[2]}", "", "test_mask_seeds_are_stable"),
    ),
    *bugs(
        "maesil/evaluation/predict.py", "evaluation/test_predict.py",
        ("weight_BL = shares_BL * masks.mask", "weight_BL = masks.mask",
         "test_the_psnr_of_crops_is_over_hidden_patches_each_by_its_valid_share"),
    ),
    *bugs(
        "maesil/evaluation/reconstruct.py", "evaluation/test_reconstruct.py",
        ("total += hidden * predictor.predict_hu(hu_BZYX, masks, valid_BZYX)\n        count += hidden",
         "total += predictor.predict_hu(hu_BZYX, masks, valid_BZYX)\n        count += 1",
         "test_predictions_of_hidden_voxels_alone_end_up_where_they_belong"),
        ("(torch.arange(crop, dtype=torch.float64) + 0.5)", "torch.arange(crop, dtype=torch.float64)",
         "test_blending_weights_of_overlapping_crops_add_up_to_one_and_vanish_at_faces[16]"),
        ("weight[box] += window_ZYX", "weight[box] += 1",
         "test_predictions_of_hidden_voxels_alone_end_up_where_they_belong"),
    ),
    *bugs(
        "maesil/evaluation/encoder_use.py", "evaluation/test_encoder_use.py",
        ('"encoder_gain_db": row[name] - by_mean[region]', '"encoder_gain_db": by_mean[region] - row[name]',
         "test_an_encoder_that_carries_the_score_is_left_alone"),
        ("by_order = score_with(shuffled)", "by_order = score_with(mean_over_crop)",
         "test_an_encoder_that_carries_the_score_is_left_alone"),
        ("statistics(latent_BND)", "statistics(mean_over_crop(latent_BND))",
         "test_an_encoder_that_carries_the_score_is_left_alone"),
        ("min(gains) < USED", "max(gains) < USED", "test_a_row_of_table_b_or_without_gains_warns_of_nothing"),
    ),
    *bugs(
        "maesil/evaluation/experiment.py", "evaluation/test_experiment.py",
        ("Split(inner.train, inner.validation, outer.validation)",
         "Split(inner.train, inner.validation, inner.validation)",
         "test_the_patients_set_aside_are_scored_and_no_others"),
        ("data.volumes(split.test)", "data.volumes(split.validation)",
         "test_the_patients_set_aside_are_scored_and_no_others"),
    ),
]

DOWNSTREAM = [
    *bugs(
        "maesil/downstream/ridge.py", "downstream/test_ridge.py",
        ("for number, one in enumerate(parts) if number != left_out", "for number, one in enumerate(parts)",
         "test_the_penalty_is_chosen_by_what_was_left_out"),
        ("(counts - 1) / 2", "(counts - 1)", "test_auroc_counts_pairs"),
        ("mean_K - mean_D @ weights", "mean_K", "test_without_a_penalty_it_is_least_squares"),
    ),
    *bugs(
        "maesil/downstream/probe.py", "downstream/test_probe.py",
        ("for patient, one in merged.items() if patient not in left_out", "for patient, one in merged.items()",
         "test_nobody_is_in_both_parts_of_a_fold_and_every_unseen_patient_is_scored_once"),
        ("_on_patches(valid == 255, P, all_of_it=True)", "_on_patches(valid > 0, P, all_of_it=True)",
         "test_a_patch_that_is_not_valid_as_a_whole_is_not_used[4]"),
        ("(along_N >= block * g - 1)", "(along_N >= block * g)", "test_one_patient_is_cut_into_layers_a_patch_apart"),
    ),
    *bugs(
        "maesil/downstream/folds.py", "downstream/test_folds.py",
        ("{leader[group] for group in trained_on if group in leader}", "trained_on",
         "test_nobody_who_was_trained_on_is_scored_under_any_name"),
    ),
    *bugs(
        "maesil/downstream/finetune.py", "downstream/test_finetune.py",
        ('if start == "pretrained":', "if start in STARTS:",
         "test_both_starts_share_the_decoder_and_the_crops_and_differ_in_the_encoder"),
        ("torch.manual_seed(seed)", "torch.manual_seed(seed + STARTS.index(start))",
         "test_both_starts_share_the_decoder_and_the_crops_and_differ_in_the_encoder"),
        ("if place.origin[axis] != at]", "]", "test_one_patient_alone_is_cut_at_its_middle_block"),
        ("if name not in scored for v in patient]", "for v in patient]",
         "test_only_unseen_patients_are_scored_and_nobody_is_in_both_parts"),
        ("inside = one.valid > 0", "inside = one.valid >= 0",
         "test_outside_the_scan_and_beyond_the_volume_nothing_is_labelled"),
    ),
    *bugs(
        "maesil/downstream/segmenter.py", "downstream/test_segmenter.py",
        ('reduction="none")[labelled].sum()', 'reduction="none").sum()', "test_unlabelled_voxels_have_no_say"),
        ("(2 * both[1:] + 1) / (sizes[1:] + 1)", "(2 * both + 1) / (sizes + 1)",
         "test_the_loss_is_cross_entropy_plus_soft_dice_without_the_background"),
        ("one, other = predicted[labelled], truth[labelled]", "one, other = predicted.flatten(), truth.flatten()",
         "test_dice_is_twice_what_both_hold_over_what_each_holds"),
    ),
    *bugs(
        "maesil/downstream/export.py", "downstream/test_export.py",
        ('card["intensity"]["mean"], card["intensity"]["std"])', 'card["intensity"]["std"], card["intensity"]["mean"])',
         "test_a_loaded_encoder_gives_the_tokens_of_the_run"),
        ("if _sha256(folder / WEIGHTS) != expected:", "if not expected:",
         "test_damage_and_other_folders_are_told_apart"),
    ),
    *bugs(
        "maesil/downstream/features.py", "downstream/test_features.py",
        ('for name in ("body", "valid")}', 'for name in ("valid", "body")}',
         "test_weights_are_body_then_valid_then_nothing"),
    ),
]
