"""Bugs of the models: MAESIL, its heads and masks, the models it is compared with."""

from __future__ import annotations

from planted.lane import bugs

# fmt: off
MODEL = [
    *bugs(
        "maesil/models/masked_autoencoder.py", "models/test_masked_autoencoder.py",
        ("self.pos_embed[ids_keep]", "self.pos_embed[: ids_keep.shape[1]]",
         "test_a_token_is_encoded_with_the_position_of_its_patch"),
        ("omega = 10.0 **", "omega = 10000.0 **",
         "test_positions_are_distinct_sines_and_cosines_padded_with_zeros[192]"),
        ("Tensor = mixed_BND + self.mlp(", "Tensor = tokens_BND + self.mlp(", "test_a_block_is_that_of_torch"),
        ("attention(*qkv_3BHNd.unbind(0))", "attention(*qkv_3BHNd.flip(0).unbind(0))", "test_a_block_is_that_of_torch"),
        ("self.norm_memory(memory_BNE))", "self.norm_memory(tokens_BSE))",
         "test_a_cross_block_attends_to_the_memory_alone_as_torch_does"),
        ("return decoded[:, -count:]", "return decoded[:, :count]",
         "test_what_is_predicted_follows_the_order_of_what_is_asked_for[subset-linear]"),
        ("masks.mask.gather(1, masks.ids_keep) == 0", "masks.mask.gather(1, masks.ids_keep) >= 0",
         "test_without_a_mask_the_pictures_are_not_filled_from_the_truth"),
        ("correlation_loss(latent_BND) if learning", "correlation_loss(latent_BND.detach()) if learning",
         "test_the_loss_on_the_latent_reaches_the_encoder"),
        ("nn.init.xavier_uniform_(module.weight, generator=generator)", "nn.init.xavier_uniform_(module.weight)",
         "test_equal_seeds_give_equal_weights_and_positions_stay_out_of_the_checkpoint"),
    ),
    *bugs(
        "maesil/models/masked_input.py", "models/test_masked_autoencoder.py",
        ("self.targets, patch_size=self.patch, window=self._window,",
         "self.targets, patch_size=self.patch, window=self.intensity.window,",
         "test_each_sample_may_have_its_own_window"),
    ),
    *bugs(
        "maesil/models/faces.py", "models/test_faces.py",
        ("torch.arange(1, -1, -1, device=rows.device)", "torch.arange(2, device=rows.device)",
         "test_the_mismatch_is_what_the_neighbour_shows_beside_the_face_less_the_face"),
        ("[rows] * self.inside_L6[ids_BS][..., None]", "[rows]",
         "test_the_mismatch_is_what_the_neighbour_shows_beside_the_face_less_the_face"),
        ("torch.where(known.usable_BN[..., None], true_BNV, tokens_at(canvas, known.ids_BN))", "true_BNV",
         "test_of_a_patch_that_is_to_be_predicted_the_truth_is_not_used"),
        ("(1 - states_BS62[..., 1:])", "torch.ones_like(states_BS62[..., 1:])",
         "test_where_predictions_meet_nothing_is_left_to_share_out"),
    ),
    *bugs(
        "maesil/models/faces.py", "models/test_heads.py",
        ("one.flip(0)[:layers]", "one[:layers]", "test_faces_are_the_outermost_layers_of_a_patch"),
        ("share = 0.5 * (1 - depth", "share = 1.0 * (1 - depth",
         "test_a_mismatch_between_predictions_is_shared_out_evenly"),
    ),
    *bugs(
        "maesil/models/heads.py", "models/test_heads.py",
        ("fade_Q * own_Q, fade_Q)", "fade_Q, fade_Q)",
         "test_what_is_predicted_for_visible_tokens_changes_nothing_for_the_hidden_ones[overlap]"),
    ),
    *bugs(
        "maesil/models/picture_head.py", "models/test_picture_head.py",
        ("decoded_BSE.detach(), draft_BSV.detach()", "decoded_BSE, draft_BSV",
         "test_no_gradient_of_the_pictures_reaches_the_model"),
        ("correct.weight.mul_(0.01)", "correct.weight.mul_(1.0)",
         "test_it_starts_as_one_that_hardly_changes_the_inside_of_the_draft"),
    ),
    *bugs(
        "maesil/models/latent.py", "models/test_latent.py",
        ("(covariance_DD.square().sum() - variance_D.square().sum())", "covariance_DD.square().sum()",
         "test_white_tokens_have_no_correlation_and_repeated_channels_have"),
        ("functional.relu(1 - (variance_D", "functional.relu((variance_D",
         "test_white_tokens_have_no_correlation_and_repeated_channels_have"),
        ("latent_BND.mean(dim=1, keepdim=True)", "latent_BND.mean(dim=(0, 1), keepdim=True)",
         "test_changes_keep_to_their_crop"),
        (" - torch.outer(mean_D, mean_D)", "", "test_the_effective_rank_is_that_of_numpy_in_one_batch_or_in_several"),
    ),
    *bugs(
        "maesil/models/masking.py", "models/test_masking.py",
        ("chosen = _chosen(in_layer, left.shape[1:], generators",
         "chosen = _chosen(in_layer, (1, *left.shape[2:]), generators",
         "test_dual_masks_hide_whole_columns_and_exact_shares_of_each_layer"),
        ("manual_seed(seed) for seed in seeds]", "manual_seed(seeds[0]) for seed in seeds]",
         "test_a_mask_depends_on_its_own_seed_alone"),
        ("return hidden | layers[..., None]", "return hidden ^ layers[..., None]",
         "test_masks_are_those_of_their_definition_by_sorting"),
    ),
]

BASELINES = [
    *bugs(
        "maesil/models/autoencoders.py", "models/test_autoencoders.py",
        ("(0.5 * log_variance).exp()", "log_variance.exp()", "test_a_drawn_code_is_that_of_torch"),
        ("min(1.0, progress / self.WARMUP)", "1.0",
         "test_the_vae_draws_with_the_noise_it_is_given_and_warms_its_auxiliary_loss_up"),
        ("        if self.training:\n            self._learn", "        if True:\n            self._learn",
         "test_the_codebook_follows_in_training_and_stands_still_while_it_is_scored"),
        ("self.sums_Kc.lerp_(sums, 1 - self.DECAY)", "self.sums_Kc.lerp_(sums, self.DECAY)",
         "test_the_codebook_is_the_average_of_what_chose_it"),
        ("(chosen - code_Bczyx).detach()", "(chosen - code_Bczyx)",
         "test_codes_are_the_nearest_and_the_gradient_passes_straight_through"),
        ("functional.mse_loss(code_Bczyx, chosen)", "functional.mse_loss(code_Bczyx.detach(), chosen)",
         "test_codes_are_the_nearest_and_the_gradient_passes_straight_through"),
        ("with_tokens_at(torch.ones_like(empty), ids_keep, torch.zeros_like(patches_BNV))", "torch.zeros_like(empty)",
         "test_convolutions_get_the_mask_as_a_channel"),
    ),
    *bugs(
        "maesil/models/slice_mae.py", "models/test_autoencoders.py",
        ("part.repeat_interleave(slices, dim=0)", "part.repeat(slices, *(1,) * (part.ndim - 1))",
         "test_the_2d_model_is_a_masked_autoencoder_of_each_slice_under_the_mask_of_its_layer"),
    ),
    *bugs(
        "maesil/models/encoders.py", "models/test_encoders.py",
        ("code_Bczyx = code_Bczyx.chunk(2, dim=1)[0]", "code_Bczyx = code_Bczyx.chunk(2, dim=1)[1]",
         "test_convolutions_give_the_code_of_their_model[vae]"),
        (".reshape(-1, P, gy * gx, self.width).mean(dim=1)", ".reshape(-1, P, gy * gx, self.width)[:, 0]",
         "test_a_token_of_slices_is_their_mean"),
        ("window=self.intensity.window, mean=self.intensity.mean", "window=self.intensity.window, mean=0.0",
         "test_tokens_stand_where_their_patches_do_on_any_grid[maesil]"),
    ),
]
