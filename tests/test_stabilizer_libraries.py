"""Libraries under `stabilize`: transformers, torch.nn and its optimizers, torch.distributions, torchmetrics.

What they compute there, gradients, buffers and the random stream included, is to the last bit what they compute outside, unless
a swap is reported; then it agrees to rounding, and nothing becomes NaN.
"""

import contextlib
import copy
import importlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import distributions, nn
from torch.utils import _pytree as pytree

import nanguard

transformers = pytest.importorskip("transformers")

BATCH, LENGTH, WORDS, CLASSES = 2, 7, 40, 3


@pytest.fixture(autouse=True)
def quiet():
    """One thread, so that sums are taken in one order, and no advice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def outcome(compute, *, guarded):
    """All tensors that it gives, the state of the random stream, and the swaps."""
    torch.manual_seed(0)
    if not guarded:
        found, swaps = compute(), []
    else:
        with nanguard.stabilize() as swaps:
            found = compute()
    found = found() if callable(found) else found
    tensors = {}
    for path, value in pytree.tree_flatten_with_path(found)[0]:
        if isinstance(value, (torch.Tensor, int, float)):
            tensors[pytree.keystr(path)] = torch.as_tensor(value).detach()
    assert tensors, "nothing to compare"
    return tensors, torch.get_rng_state(), swaps


def same_bits(one, other):
    """Whether two tensors are equal to the last bit, all NaN being the same."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    same = (one == other) & (one.signbit() == other.signbit())
    return bool((same | (one.isnan() & other.isnan())).all())


def compare(compute, rounding=1e-5, unit=0.0):
    """Run it in and out of the block, and compare; gives the rules of the swaps.

    Arguments:
        compute: gives tensors, numbers and containers of them, or a function that does so and is then called outside the block.
        rounding: by how much of the largest number in a tensor its elements may differ, if anything was swapped; `None` where
            the original has lost its digits. Infinities may become numbers.
        unit: how large the terms are of what may cancel out.
    """
    bare, stream, _ = outcome(compute, guarded=False)
    guarded, guarded_stream, swaps = outcome(compute, guarded=True)
    assert bare.keys() == guarded.keys()
    assert torch.equal(stream, guarded_stream), "another random stream"
    different = [name for name in bare if not same_bits(bare[name], guarded[name])]
    assert swaps or not different, f"no swap, but different bits: {different}"
    for name in different:
        before, after = bare[name], guarded[name]
        assert before.shape == after.shape, name
        assert before.dtype == after.dtype, name
        assert not (after.isnan() & ~before.isnan()).any(), f"{name} became NaN"
        if rounding is not None:
            finite = before.isfinite()
            error = (after[finite] - before[finite]).abs().max().item() if finite.any() else 0.0
            # A gradient that cancels out is only as accurate as its neighbours are large.
            largest = max(unit, *map(magnitude, alike(bare, name)))
            assert error <= rounding * largest, f"{name}: off by {error:.3g}, the largest number being {largest:.3g}"
    return {swap.rule for swap in swaps}


def alike(tensors, name):
    """All tensors of the same kind: all gradients, say."""
    kind = name.partition("]")[0]
    return [value for other, value in tensors.items() if other.partition("]")[0] == kind]


def magnitude(tensor):
    """The largest finite absolute value."""
    tensor = tensor.abs().double()
    return tensor[tensor.isfinite()].max().item() if tensor.isfinite().any() else 0.0


def leaf(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def integers(high, *shape, low=0, seed=2):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def differentiated(function, *leaves):
    """Outputs, and outside the block the derivatives of a weighted sum of them, as `compare` takes it."""

    def compute():
        mine = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in leaves]
        outputs = function(*mine)

        def derivatives():
            floating = [value for value in pytree.tree_leaves(outputs) if isinstance(value, torch.Tensor)]
            floating = [value for value in floating if value.requires_grad]
            if not floating:
                return {"outputs": outputs}
            # Different weights, as the derivative of a sum of probabilities is nothing.
            total = sum((value * torch.arange(1.0, value.numel() + 1).view_as(value)).sum() for value in floating)
            wanted = [tensor for tensor in mine if tensor.requires_grad]
            return {"outputs": outputs, "gradients": torch.autograd.grad(total, wanted, allow_unused=True)}

        return derivatives

    return compute


def module_step(module, loss):
    """The loss of a copy of a module, and outside the block its gradients and buffers."""
    mine = copy.deepcopy(module)
    value = loss(mine)

    def backward():
        value.backward()
        gradients = [parameter.grad for parameter in mine.parameters()]
        return {"loss": value, "gradients": gradients, "buffers": list(mine.buffers())}

    return backward


# What makes numbers of a domain out of any.
DOMAINS = {
    "real": lambda x: x,
    "positive": torch.exp,
    "softplus": F.softplus,
    "unit": torch.sigmoid,
    "simplex": lambda x: torch.softmax(x, -1),
    "by hand": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
    "log": lambda x: torch.softmax(x, -1).log(),
    "log by hand": lambda x: torch.log(x.exp() / x.exp().sum(-1, keepdim=True)),
    "log sigmoid": lambda x: torch.log(torch.sigmoid(x)),
}


# --- transformers -----------------------------------------------------------------------------------------------------


def config(*bases, **more):
    """Settings by name, of which later ones override earlier ones."""
    return {key: value for part in (*bases, more) for key, value in part.items()}


def tiny(inputs, *bases, **more):
    """What makes the inputs of a model, and its config."""
    return inputs, config(*bases, **more)


HIDDEN = config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
TEXT = config(HIDDEN, vocab_size=WORDS, max_position_embeddings=32, pad_token_id=0)
DECODER = config(TEXT, num_key_value_heads=1, head_dim=8, use_cache=False, bos_token_id=1, eos_token_id=2)
EXPERTS = config(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
QWEN_EXPERTS = config(num_experts=4, moe_intermediate_size=8, decoder_sparse_step=1)
GPT = config(vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=32, use_cache=False)
SEQ2SEQ = config(
    vocab_size=WORDS,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    use_cache=False,
)
T5 = config(
    vocab_size=WORDS,
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=2,
    pad_token_id=0,
    decoder_start_token_id=0,
    use_cache=False,
)
IMAGE = config(HIDDEN, image_size=16, patch_size=8)
SPEECH = config(
    HIDDEN,
    vocab_size=WORDS,
    conv_dim=(8, 8),
    conv_stride=(5, 4),
    conv_kernel=(5, 4),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    apply_spec_augment=False,
    classifier_proj_size=8,
)
SERIES = config(
    prediction_length=4,
    context_length=8,
    lags_sequence=[1, 2],
    num_time_features=1,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
)
RESNET = config(
    embedding_size=8,
    hidden_sizes=[8, 8, 16, 16],
    depths=[1, 1, 1, 1],
    layer_type="basic",
    out_features=["stage2", "stage3", "stage4"],
)


def words(**more):
    return {"input_ids": integers(WORDS, BATCH, LENGTH, low=4), **more}


def padded(**more):
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, 4:] = 0
    return words(attention_mask=mask, **more)


def language():
    labels = integers(WORDS, BATCH, LENGTH, low=4, seed=3)
    labels[0, :2] = -100
    return words(labels=labels)


def padded_language():
    return {**padded(), "labels": language()["labels"]}


def sequence():
    return padded(labels=integers(CLASSES, BATCH))


def tokens():
    return padded(labels=integers(CLASSES, BATCH, LENGTH))


def spans():
    return padded(start_positions=integers(LENGTH, BATCH), end_positions=integers(LENGTH, BATCH, seed=5))


def choices():
    return {"input_ids": integers(WORDS, BATCH, 3, LENGTH, low=4), "labels": integers(3, BATCH)}


def translation():
    return padded(labels=integers(WORDS, BATCH, LENGTH, low=4, seed=3))


def images(size=16):
    return {"pixel_values": leaf(BATCH, 3, size, size).detach()}


def classified(size=16):
    return {**images(size), "labels": integers(CLASSES, BATCH)}


def segmented():
    return {**images(32), "labels": integers(CLASSES, BATCH, 32, 32)}


def boxes():
    boxes = torch.tensor([[0.5, 0.5, 0.3, 0.2], [0.3, 0.6, 0.2, 0.4]])
    labels = [
        {"class_labels": torch.tensor([0, 2]), "boxes": boxes},
        {"class_labels": torch.tensor([1]), "boxes": boxes[:1]},
    ]
    return {**images(64), "labels": labels}


def captions():
    return {**words(), **images(), "return_loss": True}


def waves(**labels):
    return {"input_values": leaf(BATCH, 400).detach(), **labels}


def spectra():
    return {"input_features": leaf(BATCH, 8, 40).detach(), "labels": integers(WORDS, BATCH, 5, low=4)}


def series():
    def times(length, seed):
        return leaf(BATCH, length, 1, seed=seed).detach()

    return {
        "past_values": leaf(BATCH, 10).detach().exp(),
        "past_time_features": times(10, 3),
        "past_observed_mask": torch.ones(BATCH, 10),
        "future_values": leaf(BATCH, 4, seed=4).detach().exp(),
        "future_time_features": times(4, 5),
    }


def patches():
    return {"past_values": leaf(BATCH, 16, 2).detach(), "future_values": leaf(BATCH, 4, 2, seed=3).detach()}


def tables():
    return words(
        token_type_ids=integers(2, BATCH, LENGTH, 7),
        labels=integers(2, BATCH, LENGTH, seed=7),
        numeric_values=leaf(BATCH, LENGTH).detach(),
        numeric_values_scale=torch.ones(BATCH, LENGTH),
        float_answer=torch.tensor([float("nan"), 2.0]),
    )


def questions():
    return {**words(), **images(), "labels": leaf(BATCH, CLASSES).detach().sigmoid()}


def masked_waves():
    return waves(
        mask_time_indices=integers(2, BATCH, 20).bool(), sampled_negative_indices=integers(20, BATCH, 20, 3, seed=4)
    )


def sounds():
    return {**words(), "input_features": leaf(BATCH, 1, 24, 8).detach(), "return_loss": True}


def masks():
    return {
        **images(64),
        "mask_labels": [integers(2, 2, 64, 64).float()] * 2,
        "class_labels": [torch.tensor([0, 2])] * 2,
    }


def perceived():
    return {"inputs": words()["input_ids"], "labels": language()["labels"]}


def sounds_of_a_class():
    return {"input_values": leaf(BATCH, 24, 16).detach(), "labels": integers(CLASSES, BATCH)}


def replaced():
    return padded(labels=integers(2, BATCH, LENGTH))


def global_spans():
    return {**spans(), "global_attention_mask": integers(2, BATCH, LENGTH)}


def large_images():
    return classified(32)


def spoken():
    return waves(labels=integers(WORDS, BATCH, 4, low=1))


MODELS = {
    "AlbertForMaskedLM": tiny(language, TEXT, embedding_size=8),
    "ASTForAudioClassification": tiny(sounds_of_a_class, HIDDEN, num_mel_bins=16, max_length=24, patch_size=8,
        frequency_stride=8, time_stride=8),
    "AutoformerForPrediction": tiny(series, SERIES, label_length=4, moving_average=3),
    "BartForConditionalGeneration": tiny(translation, SEQ2SEQ),
    "BeitForImageClassification": tiny(classified, IMAGE),
    "BertForMaskedLM": tiny(padded_language, TEXT),
    "BertForMultipleChoice": tiny(choices, TEXT),
    "BertForQuestionAnswering": tiny(spans, TEXT, num_labels=2),
    "BertForSequenceClassification": tiny(sequence, TEXT),
    "BertForTokenClassification": tiny(tokens, TEXT),
    "BigBirdForMaskedLM": tiny(language, TEXT, attention_type="original_full"),
    "BloomForCausalLM": tiny(padded_language, vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=2, use_cache=False),
    "ClapModel": tiny(sounds, text_config=config(TEXT, type_vocab_size=1, max_position_embeddings=40),
        audio_config=config(spec_size=64, num_mel_bins=8, patch_embeds_hidden_size=8, hidden_size=16, patch_size=4,
        patch_stride=[4, 4], window_size=2, depths=[1, 1], projection_dim=8, num_attention_heads=[2, 2],
        enable_fusion=False, num_hidden_layers=2), projection_dim=8),
    "CLIPModel": tiny(captions, text_config=config(TEXT, eos_token_id=2, bos_token_id=1), vision_config=IMAGE,
        projection_dim=8),
    "ConvNextForImageClassification": tiny(large_images, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
        drop_path_rate=0.2),
    "DebertaV2ForSequenceClassification": tiny(sequence, TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_buckets=4, pooler_hidden_size=16),
    "DeepseekV3ForCausalLM": tiny(language, DECODER, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=8, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        head_dim=4, n_group=2, topk_group=1, first_k_dense_replace=1),
    "DeformableDetrForObjectDetection": tiny(boxes, use_timm_backbone=False, backbone_config=config(RESNET,
        model_type="resnet"), d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=6, with_box_refine=True,
        two_stage=True, two_stage_num_proposals=6, auxiliary_loss=True, num_feature_levels=3),
    "DetrForObjectDetection": tiny(boxes, use_timm_backbone=False, backbone_config=config(RESNET, model_type="resnet",
        out_features=["stage4"]), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=6),
    "DistilBertForSequenceClassification": tiny(sequence, vocab_size=WORDS, dim=16, n_layers=2, n_heads=2,
        hidden_dim=24, max_position_embeddings=32),
    "ElectraForPreTraining": tiny(replaced, TEXT, embedding_size=8),
    "FalconForCausalLM": tiny(padded_language, HIDDEN, vocab_size=WORDS, use_cache=False, hidden_dropout=0.1,
        alibi=True),
    "FalconMambaForCausalLM": tiny(language, TEXT, state_size=4, expand=1, use_cache=False),
    "FunnelForMaskedLM": tiny(language, vocab_size=WORDS, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8,
        d_inner=16),
    "Gemma2ForCausalLM": tiny(padded_language, DECODER, sliding_window=4),
    "GemmaForCausalLM": tiny(language, DECODER),
    "GPT2ForSequenceClassification": tiny(sequence, GPT, pad_token_id=0),
    "GPT2LMHeadModel": tiny(language, GPT),
    "GPTNeoXForCausalLM": tiny(language, TEXT),
    "GraniteMoeForCausalLM": tiny(language, DECODER, EXPERTS),
    "GroupViTModel": tiny(captions, text_config=config(TEXT, eos_token_id=2, bos_token_id=1),
        vision_config=config(HIDDEN, image_size=16, patch_size=4, depths=[1, 1], num_group_tokens=[4, 2],
        num_output_groups=[4, 2]), projection_dim=8, projection_intermediate_dim=16),
    "HubertForCTC": tiny(spoken, SPEECH),
    "InformerForPrediction": tiny(series, SERIES),
    "JambaForCausalLM": tiny(language, DECODER, num_experts=2, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, output_router_logits=True,
        use_mamba_kernels=False),
    "KimiLinearForCausalLM": tiny(language, TEXT, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        linear_head_dim=8, linear_num_heads=2, layer_types=["linear_attention", "full_attention"], use_cache=False,
        bos_token_id=1, eos_token_id=2),
    "LlamaForCausalLM": tiny(padded_language, DECODER),
    "LongformerForQuestionAnswering": tiny(global_spans, TEXT, attention_window=4, sep_token_id=2, num_labels=2),
    "LwDetrForObjectDetection": tiny(boxes, backbone_config=config(model_type="lw_detr_vit", hidden_size=16,
        num_hidden_layers=2, num_attention_heads=2, image_size=64, pretrain_image_size=64, patch_size=8, num_windows=4,
        out_indices=[1, 2], window_block_indices=[0]), projector_scale_factors=[1.0], d_model=16, decoder_layers=2,
        decoder_ffn_dim=16, decoder_self_attention_heads=2, decoder_cross_attention_heads=2, num_queries=6,
        group_detr=2, c2f_num_blocks=1),
    "Mamba2ForCausalLM": tiny(language, vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8,
        state_size=4, n_groups=2, chunk_size=4, use_cache=False),
    "MambaForCausalLM": tiny(language, TEXT, state_size=4, expand=1, use_cache=False),
    "Mask2FormerForUniversalSegmentation": tiny(masks, backbone_config=config(model_type="swin", image_size=64,
        patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, out_features=["stage1",
        "stage2", "stage3", "stage4"]), feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        num_queries=5, train_num_points=20),
    "MistralForCausalLM": tiny(padded_language, DECODER, sliding_window=4),
    "MixtralForCausalLM": tiny(language, DECODER, EXPERTS),
    "ModernBertForMaskedLM": tiny(padded_language, TEXT),
    "OPTForCausalLM": tiny(padded_language, TEXT, word_embed_proj_dim=16, ffn_dim=24, use_cache=False),
    "PatchTSTForPrediction": tiny(patches, HIDDEN, num_input_channels=2, context_length=16, patch_length=4,
        prediction_length=4, d_model=16, ffn_dim=16, loss="nll", distribution_output="student_t"),
    "PegasusForConditionalGeneration": tiny(translation, SEQ2SEQ),
    "PerceiverForMaskedLM": tiny(perceived, vocab_size=WORDS, d_model=16, d_latents=16, num_latents=4, num_blocks=1,
        num_self_attends_per_block=2, num_self_attention_heads=2, num_cross_attention_heads=2, qk_channels=16,
        v_channels=16, max_position_embeddings=LENGTH),
    "PhimoeForCausalLM": tiny(language, DECODER, EXPERTS),
    "ProphetNetForConditionalGeneration": tiny(translation, vocab_size=WORDS, hidden_size=16, num_encoder_layers=1,
        num_decoder_layers=1, num_encoder_attention_heads=2, num_decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, max_position_embeddings=32, use_cache=False),
    "Qwen2ForCausalLM": tiny(padded_language, DECODER),
    "Qwen3MoeForCausalLM": tiny(language, DECODER, QWEN_EXPERTS, num_experts_per_tok=2, output_router_logits=True),
    "RecurrentGemmaForCausalLM": tiny(language, DECODER, lru_width=16, attention_window_size=4,
        block_types=["recurrent", "attention"], w_init_variance_scale=0.01),
    "RobertaForMaskedLM": tiny(padded_language, TEXT),
    "RTDetrForObjectDetection": tiny(boxes, backbone_config=config(RESNET, model_type="rt_detr_resnet",
        downsample_in_bottleneck=False), encoder_in_channels=[8, 16, 16], encoder_hidden_dim=16, d_model=16,
        num_queries=6, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
        decoder_in_channels=[16, 16, 16], decoder_layers=2, num_denoising=4, freeze_backbone_batch_norms=False),
    "RwkvForCausalLM": tiny(language, TEXT, attention_hidden_size=16, context_length=32, use_cache=False),
    "SegformerForSemanticSegmentation": tiny(segmented, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8),
    "SiglipModel": tiny(captions, text_config=config(TEXT, projection_size=16), vision_config=IMAGE),
    "SwitchTransformersForConditionalGeneration": tiny(translation, T5, num_experts=4, expert_capacity=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, output_router_logits=True),
    "T5ForConditionalGeneration": tiny(translation, T5),
    "TapasForQuestionAnswering": tiny(tables, TEXT, type_vocab_sizes=[3, 8, 8, 2, 8, 8, 4], num_aggregation_labels=4,
        use_answer_as_supervision=True, answer_loss_importance=1.0, use_normalized_answer_loss=True,
        huber_loss_delta=0.5, temperature=1.0, cell_selection_preference=0.2, max_num_rows=8, max_num_columns=8),
    "TimeSeriesTransformerForPrediction": tiny(series, SERIES),
    "ViltForQuestionAnswering": tiny(questions, TEXT, IMAGE, num_labels=3),
    "ViTForImageClassification": tiny(classified, IMAGE),
    "ViTMAEForPreTraining": tiny(images, IMAGE, decoder_hidden_size=16, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=16),
    "Wav2Vec2ForCTC": tiny(spoken, SPEECH),
    "Wav2Vec2ForPreTraining": tiny(masked_waves, SPEECH, num_codevector_groups=2, num_codevectors_per_group=4,
        codevector_dim=8, proj_codevector_dim=8, num_negatives=3),
    "WhisperForConditionalGeneration": tiny(spectra, SEQ2SEQ, num_mel_bins=8, max_source_positions=20,
        max_target_positions=16),
    "XLNetLMHeadModel": tiny(language, vocab_size=WORDS, d_model=16, n_layer=2, n_head=2, d_inner=24),
}  # fmt: skip


# Those whose rotary or other positions, decays or slopes are computed with powers, exponentials and logarithms.
BUILT_INSIDE = ["BloomForCausalLM", "DeformableDetrForObjectDetection", "FalconForCausalLM", "KimiLinearForCausalLM"]
BUILT_INSIDE += ["LlamaForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM", "RecurrentGemmaForCausalLM"]
BUILT_INSIDE += ["T5ForConditionalGeneration", "ViTMAEForPreTraining", "WhisperForConditionalGeneration"]


def built(name, **more):
    """A tiny model with random weights, in train mode, and what it is fed."""
    if not hasattr(transformers, name):
        pytest.skip(f"no {name} in transformers {transformers.__version__}")
    inputs, settings = MODELS[name]
    torch.manual_seed(0)
    head = getattr(transformers, name)
    return head(head.config_class(**config({"num_labels": CLASSES}, settings, more))).train(), inputs()


@pytest.fixture(autouse=True)
def without_pillow(monkeypatch):
    """The losses of detectors import this function, which needs no images, only where there is Pillow."""
    from transformers.image_transforms import center_to_corners_format

    for module in ("d_fine", "for_object_detection", "lw_detr", "rt_detr"):
        path = f"transformers.loss.loss_{module}"
        monkeypatch.setattr(f"{path}.center_to_corners_format", center_to_corners_format, raising=False)


def training_step(model, inputs, *, around=contextlib.nullcontext, inside=False, rounding=1e-5):
    """Compare outputs, loss, gradients and buffers of one step; gives the rules of the swaps."""

    def compute():
        mine, arguments = copy.deepcopy(model), copy.deepcopy(inputs)
        with around():
            result = mine(**arguments)

        def backward():
            result.loss.sum().backward()
            gradients = {name: parameter.grad for name, parameter in mine.named_parameters()}
            return {"result": dict(result), "gradients": gradients, "buffers": dict(mine.named_buffers())}

        return backward() if inside else backward

    return compare(compute, rounding)


class TestTransformers:
    """One step in train mode, dropout and all. Few of them take logarithms of probabilities, and so few are swapped."""

    SWAPPED = ("DeformableDetr", "KimiLinear", "LwDetr", "RTDetr", "Tapas")

    @pytest.mark.parametrize("name", MODELS)
    def test_backward_outside(self, name):
        model, inputs = built(name)
        rules = training_step(model, inputs)
        assert rules or not name.startswith(self.SWAPPED)

    @pytest.mark.parametrize("name", MODELS)
    def test_eager_attention_and_backward_inside(self, name):
        model, inputs = built(name)
        model.set_attn_implementation("eager")
        training_step(model, inputs, inside=True)

    @pytest.mark.parametrize("name", MODELS)
    def test_weights_that_are_far_too_large(self, name):
        model, inputs = built(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10)
        training_step(model, inputs, rounding=None)

    @pytest.mark.parametrize("name", MODELS)
    def test_autocast(self, name):
        model, inputs = built(name)
        training_step(model, inputs, around=lambda: torch.autocast("cpu", torch.bfloat16), rounding=1e-2)

    @pytest.mark.parametrize("name", BUILT_INSIDE)
    def test_built_inside(self, name):
        """Initial weights, and tables of positions and frequencies."""

        def compute():
            model, _ = built(name)
            return {"state": model.state_dict(), "buffers": dict(model.named_buffers())}

        # RecurrentGemma starts from log(exp(x) - 1), in place.
        assert compare(compute) == ({"NG111"} if name == "RecurrentGemmaForCausalLM" else set())

    @pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
    @pytest.mark.parametrize("name", MODELS)
    def test_checkpointed(self, name, reentrant):
        model, inputs = built(name)
        if not model.supports_gradient_checkpointing:
            pytest.skip("no checkpoints")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        training_step(model, inputs)

    @pytest.mark.parametrize(
        ("name", "how"),
        [
            ("GPT2LMHeadModel", {"do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 0.7}),
            ("LlamaForCausalLM", {"num_beams": 3, "repetition_penalty": 1.5}),
            ("T5ForConditionalGeneration", {"num_beams": 2, "do_sample": True}),
            ("WhisperForConditionalGeneration", {"do_sample": False}),
            ("MambaForCausalLM", {"do_sample": True, "typical_p": 0.8, "eta_cutoff": 1e-3}),
        ],
    )
    def test_generation(self, name, how):
        model, inputs = built(name)
        model.eval()
        inputs.pop("labels")
        settings = {**how, "max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True}

        def compute():
            found = copy.deepcopy(model).generate(**inputs, **settings)
            return {"tokens": found.sequences, "scores": found.scores}

        compare(compute)

    @pytest.mark.parametrize("name", ["InformerForPrediction", "PatchTSTForPrediction"])
    def test_forecasts(self, name):
        model, inputs = built(name)
        model.eval()
        inputs = {key: value for key, value in inputs.items() if key != "future_values"}
        compare(lambda: copy.deepcopy(model).generate(**inputs)["sequences"])

    def test_sinkhorn(self):
        from transformers.models.superglue.modeling_superglue import log_optimal_transport

        score = leaf()
        compare(differentiated(lambda scores, alpha: log_optimal_transport(scores, alpha, 5), leaf(1, 5, 6), score))

    @pytest.mark.parametrize("domain", ["unit", "simplex"])
    def test_binomial_softmax_of_depths(self, domain):
        from transformers.models.zoedepth.modeling_zoedepth import LogBinomialSoftmax

        binomial = LogBinomialSoftmax(n_classes=8)
        compare(differentiated(lambda x: binomial(DOMAINS[domain](x)), leaf(2, 1, 3, 3)))

    @pytest.mark.parametrize("reverse", [False, True])
    def test_splines_of_speech(self, reverse):
        """Softmaxes that are summed up, padded, edited through indices, gathered and divided before a logarithm."""
        from transformers.models.vits.modeling_vits import _unconstrained_rational_quadratic_spline as spline

        leaves = [leaf(2, 6, seed=1), *(leaf(2, 6, bins, seed=2 + bins) for bins in (10, 10, 9))]
        compare(differentiated(lambda x, w, h, d: spline(x, w, h, d, reverse=reverse, tail_bound=3.0), *leaves))

    def test_durations_of_speech(self):
        from transformers import VitsConfig
        from transformers.models.vits.modeling_vits import VitsStochasticDurationPredictor

        torch.manual_seed(0)
        small = {"hidden_size": 8, "duration_predictor_flow_bins": 4, "depth_separable_num_layers": 2}
        predictor = VitsStochasticDurationPredictor(VitsConfig(**small, duration_predictor_num_flows=2))
        inputs, mask = leaf(BATCH, 8, 6), torch.ones(BATCH, 1, 6)
        durations = integers(4, BATCH, 1, 6, low=1).float()
        compare(lambda: module_step(predictor, lambda mine: mine(inputs, mask, durations=durations).sum()))


# --- torch.nn and torch.optim -----------------------------------------------------------------------------------------


ROWS, COLUMNS = 6, 4
LABELS = integers(COLUMNS, ROWS)
ONES = integers(2, ROWS, COLUMNS)
SIGNS = ONES.float() * 2 - 1


def soft(seed=9):
    return torch.softmax(leaf(ROWS, COLUMNS, seed=seed).detach(), -1)


# Each with the domains of its input, and what it is called with after the input.
LOSSES = {
    "L1Loss": (["real", "simplex", "log"], [soft()]),
    "NLLLoss": (["real", "log", "log by hand"], [LABELS]),
    "NLLLoss2d": (["log"], [integers(ROWS, 2, 3)]),
    "PoissonNLLLoss": (["real", "log"], [ONES.float()]),
    "GaussianNLLLoss": (["real", "simplex"], [soft(), soft(8)]),
    "KLDivLoss": (["log", "log by hand", "log sigmoid"], [soft()]),
    "MSELoss": (["real", "unit", "simplex", "by hand"], [soft()]),
    "BCELoss": (["unit", "simplex", "by hand"], [ONES.float()]),
    "BCEWithLogitsLoss": (["real"], [ONES.float()]),
    "HingeEmbeddingLoss": (["real", "unit"], [SIGNS]),
    "MultiLabelMarginLoss": (["real", "simplex"], [integers(COLUMNS, ROWS, COLUMNS)]),
    "SmoothL1Loss": (["real", "simplex"], [soft()]),
    "HuberLoss": (["real", "simplex"], [soft()]),
    "SoftMarginLoss": (["real", "unit"], [SIGNS]),
    "CrossEntropyLoss": (["real", "simplex", "by hand", "log"], [LABELS]),
    "LinearCrossEntropyLoss": (["real"], [LABELS]),
    "MultiLabelSoftMarginLoss": (["real", "log"], [ONES.float()]),
    "CosineEmbeddingLoss": (["real", "simplex"], [soft(), SIGNS[:, 0]]),
    "MarginRankingLoss": (["real", "unit"], [soft(), SIGNS]),
    "MultiMarginLoss": (["real", "simplex"], [LABELS]),
    "TripletMarginLoss": (["real", "simplex"], [soft(), soft(8)]),
    "TripletMarginWithDistanceLoss": (["real", "simplex"], [soft(), soft(8)]),
    "CTCLoss": (["log", "log by hand"], [torch.tensor([1, 2, 3]), torch.tensor(ROWS), torch.tensor(3)]),
}
MODULES = {
    "AdaptiveLogSoftmaxWithLoss": (lambda: nn.AdaptiveLogSoftmaxWithLoss(COLUMNS, 8, [2, 5]), [LABELS]),
    "Bilinear": (lambda: nn.Bilinear(COLUMNS, COLUMNS, 3), [soft()]),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(COLUMNS), []),
    "Dropout": (lambda: nn.Dropout(0.3), []),
    "GELU": (nn.GELU, []),
    "GLU": (nn.GLU, []),
    "GRU": (lambda: nn.GRU(COLUMNS, 3, num_layers=2, dropout=0.2), []),
    "LSTM": (lambda: nn.LSTM(COLUMNS, 3, bidirectional=True), []),
    "LayerNorm": (lambda: nn.LayerNorm(COLUMNS), []),
    "LogSigmoid": (nn.LogSigmoid, []),
    "LogSoftmax": (lambda: nn.LogSoftmax(dim=-1), []),
    "Mish": (nn.Mish, []),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(COLUMNS, 2, dropout=0.2),
        [leaf(5, COLUMNS), leaf(5, COLUMNS)],
    ),
    "PReLU": (nn.PReLU, []),
    "RReLU": (nn.RReLU, []),
    "SiLU": (nn.SiLU, []),
    "Sigmoid": (nn.Sigmoid, []),
    "Softmax": (lambda: nn.Softmax(dim=0), []),
    "Softmax2d": (lambda: nn.Sequential(nn.Unflatten(0, (1, 2, 3)), nn.Softmax2d()), []),
    "Softmin": (lambda: nn.Softmin(dim=-1), []),
    "Softplus": (lambda: nn.Softplus(beta=2.0), []),
    "Transformer": (
        lambda: nn.Transformer(COLUMNS, 2, 1, 1, 8, batch_first=True),
        [leaf(5, COLUMNS)],
    ),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(COLUMNS, 2, 8), [leaf(5, COLUMNS)]),
    "TransformerEncoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(COLUMNS, 2, 8), 2), []),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(COLUMNS, 2, 8, norm_first=True), []),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(COLUMNS, 3)), []),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(COLUMNS, 3)), []),
}
OPTIMIZERS = {
    "ASGD": {},
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {"lr_decay": 0.1},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "LBFGS": {"line_search_fn": "strong_wolfe"},
    "Muon": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "Rprop": {},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "SparseAdam": {},
}


class TestNeuralNetworks:
    def test_no_loss_is_left_out(self):
        assert {name for name in nn.modules.loss.__all__ if hasattr(nn, name)} <= LOSSES.keys()

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize(("name", "domain"), [(name, domain) for name in LOSSES for domain in LOSSES[name][0]])
    def test_loss(self, name, domain, reduction):
        if not hasattr(nn, name):
            pytest.skip(f"no {name} in torch {torch.__version__}")
        _, rest = LOSSES[name]
        arguments = {"in_features": COLUMNS, "num_classes": COLUMNS} if name == "LinearCrossEntropyLoss" else {}
        torch.manual_seed(0)
        loss = getattr(nn, name)(reduction=reduction, **arguments)
        shape = (2, ROWS, 3, 1) if name.endswith("2d") else (ROWS, COLUMNS)
        rest = [rest[0].unsqueeze(-1)] if name.endswith("2d") else rest
        compare(differentiated(lambda x: loss(DOMAINS[domain](x), *rest), leaf(*shape)))

    @pytest.mark.parametrize("domain", ["real", "simplex", "log"])
    @pytest.mark.parametrize("name", MODULES)
    def test_module(self, name, domain):
        build, rest = MODULES[name]
        torch.manual_seed(0)
        module = build()

        def step(mine):
            result = mine(DOMAINS[domain](leaf(ROWS, COLUMNS)), *rest)
            floating = [part for part in pytree.tree_leaves(result) if torch.is_floating_point(part)]
            return sum((part * torch.arange(1.0, part.numel() + 1).view_as(part)).sum() for part in floating)

        compare(lambda: module_step(module, step))

    @pytest.mark.parametrize("needs", [{}, {"need_weights": False}, {"average_attn_weights": False}], ids=str)
    def test_attention_with_masks(self, needs):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True, add_zero_attn=True, bias=True)
        padding = torch.zeros(BATCH, 5, dtype=torch.bool)
        padding[1, 3:] = True
        causal = nn.Transformer.generate_square_subsequent_mask(5).isinf()

        def step(mine):
            x = leaf(BATCH, 5, 8)
            mixed, weights = mine(x, x, x, key_padding_mask=padding, attn_mask=causal, **needs)
            return mixed.square().sum() if weights is None else mixed.square().sum() + weights.square().sum()

        compare(lambda: module_step(attention, step))

    def test_encoder_without_gradients(self):
        """Under any function mode torch leaves its fast path, which rounds differently: the README says so."""
        torch.manual_seed(0)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2).eval()
        padding = torch.zeros(BATCH, 5, dtype=torch.bool)
        padding[1, 3:] = True
        x = leaf(BATCH, 5, 8)
        with torch.no_grad():
            plain = encoder(x, src_key_padding_mask=padding)
            with nanguard.stabilize() as swaps:
                guarded = encoder(x, src_key_padding_mask=padding)
        assert swaps == []
        torch.testing.assert_close(guarded[~padding], plain[~padding])

    @pytest.mark.parametrize("hard", [False, True])
    def test_gumbel_softmax(self, hard):
        compare(differentiated(lambda x: F.gumbel_softmax(x, tau=0.5, hard=hard) ** 2, leaf(ROWS, COLUMNS)))
        compare(differentiated(lambda x: F.gumbel_softmax(torch.softmax(x, -1).log(), hard=hard), leaf(ROWS, COLUMNS)))

    def test_no_optimizer_is_left_out(self):
        found = {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)}
        assert found - {"Optimizer"} <= OPTIMIZERS.keys()

    @pytest.mark.parametrize("foreach", [False, True], ids=["", "foreach"])
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_optimizer(self, name, foreach):
        if not hasattr(torch.optim, name):
            pytest.skip(f"no {name}")
        single = name in ("LBFGS", "Muon", "SparseAdam")
        torch.manual_seed(0)
        sparse = name == "SparseAdam"
        first = nn.Embedding(8, COLUMNS, sparse=True) if sparse else nn.Linear(COLUMNS, 5, bias=False)
        inputs = integers(8, ROWS) if sparse else leaf(ROWS, COLUMNS).detach()

        def train():
            model = copy.deepcopy(first)
            more = {} if single else {"foreach": foreach}
            optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05, **OPTIMIZERS[name], **more)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2) if not single else None
            mean = torch.optim.swa_utils.AveragedModel(model)

            def closure():
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), LABELS)
                loss.backward()
                return loss

            losses = []
            for _ in range(3):
                losses.append(optimizer.step(closure))
                if schedule is not None:
                    schedule.step()
                if not sparse:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                mean.update_parameters(model)
            state = optimizer.state_dict()["state"]
            return {"losses": losses, "model": model.state_dict(), "mean": mean.state_dict(), "state": state}

        compare(train)


# --- torch.distributions ----------------------------------------------------------------------------------------------


def covariance(x):
    """A positive definite matrix of the last dim."""
    factor = x.unsqueeze(-1) * x.unsqueeze(-2)
    return factor + 2 * torch.eye(x.shape[-1])


MATRICES = {
    "covariance": covariance,
    "precision": covariance,
    "factor": lambda x: torch.linalg.cholesky(covariance(x)),
    "columns": lambda x: x.unsqueeze(-1),
    "concentration of correlations": lambda x: x.exp().sum() + 1,
    "degrees": lambda x: x.exp().sum(-1) + COLUMNS,
}
PARAMETERS = {**DOMAINS, **MATRICES}


def mixture(weights, means, scales):
    return distributions.MixtureSameFamily(
        distributions.Categorical(probs=weights), distributions.Normal(means, scales)
    )


def transformed(loc, scale):
    # A logistic distribution.
    base = distributions.Uniform(torch.zeros(COLUMNS), torch.ones(COLUMNS))
    steps = [distributions.SigmoidTransform().inv, distributions.AffineTransform(loc, scale)]
    return distributions.TransformedDistribution(base, steps)


# Each with the domains of its parameters, in which a softmax, sigmoid or exponential may make them.
DISTRIBUTIONS = {
    "Bernoulli": [{"probs": "unit"}, {"probs": "simplex"}, {"probs": "by hand"}, {"logits": "real"}, {"logits": "log"}],
    "Beta": [{"concentration1": "positive", "concentration0": "softplus"}],
    "Binomial": [{"probs": "unit"}, {"logits": "real"}],
    "Categorical": [{"probs": "simplex"}, {"probs": "positive"}, {"probs": "by hand"}, {"logits": "real"}, {"logits": "log"},
                    {"logits": "log by hand"}],
    "Cauchy": [{"loc": "real", "scale": "positive"}],
    "Chi2": [{"df": "positive"}],
    "ContinuousBernoulli": [{"probs": "unit"}, {"logits": "real"}],
    "Dirichlet": [{"concentration": "positive"}, {"concentration": "simplex"}],
    "Exponential": [{"rate": "positive"}, {"rate": "softplus"}],
    "FisherSnedecor": [{"df1": "positive", "df2": "softplus"}],
    "Gamma": [{"concentration": "positive", "rate": "positive"}, {"concentration": "softplus", "rate": "simplex"}],
    "GeneralizedPareto": [{"loc": "real", "scale": "positive", "concentration": "unit"}],
    "Geometric": [{"probs": "unit"}, {"probs": "simplex"}, {"logits": "real"}],
    "Gumbel": [{"loc": "real", "scale": "positive"}, {"loc": "log", "scale": "unit"}],
    "HalfCauchy": [{"scale": "positive"}],
    "HalfNormal": [{"scale": "positive"}],
    "InverseGamma": [{"concentration": "positive", "rate": "positive"}],
    "Kumaraswamy": [{"concentration1": "positive", "concentration0": "positive"}],
    "LKJCholesky": [{"concentration": "concentration of correlations"}],
    "Laplace": [{"loc": "real", "scale": "positive"}],
    "LogNormal": [{"loc": "real", "scale": "positive"}, {"loc": "log", "scale": "softplus"}],
    "LogisticNormal": [{"loc": "real", "scale": "positive"}],
    "LowRankMultivariateNormal": [{"loc": "real", "cov_factor": "columns", "cov_diag": "positive"}],
    "Multinomial": [{"probs": "simplex"}, {"logits": "real"}],
    "MultivariateNormal": [{"loc": "real", "covariance_matrix": "covariance"}, {"loc": "real", "scale_tril": "factor"},
                           {"loc": "log", "precision_matrix": "precision"}],
    "NegativeBinomial": [{"total_count": "positive", "probs": "unit"}, {"total_count": "positive", "logits": "real"}],
    "Normal": [{"loc": "real", "scale": "positive"}, {"loc": "simplex", "scale": "softplus"}],
    "OneHotCategorical": [{"probs": "simplex"}, {"logits": "real"}],
    "OneHotCategoricalStraightThrough": [{"probs": "simplex"}, {"logits": "log"}],
    "Pareto": [{"scale": "positive", "alpha": "positive"}],
    "Poisson": [{"rate": "positive"}, {"rate": "softplus"}],
    "RelaxedBernoulli": [{"probs": "unit"}, {"logits": "real"}],
    "RelaxedOneHotCategorical": [{"probs": "simplex"}, {"logits": "real"}, {"logits": "log"}],
    "StudentT": [{"df": "positive", "loc": "real", "scale": "positive"}],
    "Uniform": [{"low": "real", "high": "upper"}],
    "VonMises": [{"loc": "unit", "concentration": "positive"}],
    "Weibull": [{"scale": "positive", "concentration": "positive"}],
    "Wishart": [{"df": "degrees", "covariance_matrix": "covariance"}],
    "MixtureSameFamily": [{"weights": "simplex", "means": "real", "scales": "positive"},
                          {"weights": "by hand", "means": "log", "scales": "softplus"}],
    "TransformedDistribution": [{"loc": "real", "scale": "positive"}],
}  # fmt: skip
PARAMETERS["upper"] = lambda x: x.exp() + 4
ARGUMENTS = {
    "Binomial": {"total_count": 5},
    "LKJCholesky": {"dim": 3},
    "Multinomial": {"total_count": 5},
    "RelaxedBernoulli": {"temperature": torch.tensor(0.7)},
    "RelaxedOneHotCategorical": {"temperature": torch.tensor(0.7)},
}
BUILDERS = {"MixtureSameFamily": mixture, "TransformedDistribution": transformed}
# Independent is of all of them; the others are abstract.
ABSTRACT = {"Distribution", "ExponentialFamily", "Independent"}
DISTRIBUTION_CASES = [
    pytest.param(name, domains, id=f"{name}-{'-'.join(f'{key}={value}' for key, value in domains.items())}")
    for name, cases in DISTRIBUTIONS.items()
    for domains in cases
]


def made(domain, x):
    return PARAMETERS[domain](x)


def distribution(name, domains, values):
    build = BUILDERS.get(name) or getattr(distributions, name)
    return build(**dict(zip(domains, values, strict=True)), **ARGUMENTS.get(name, {}))


def attempt(function, *arguments):
    """What it gives, or `None` where the distribution does not have that."""
    try:
        return function(*arguments)
    except (NotImplementedError, AttributeError):
        return None


def all_of(name, found):
    """Everything that a distribution can say."""
    sample = found.sample((2,))
    names = ("mean", "mode", "variance", "stddev", "logits", "probs", "param_shape")
    result = {name: attempt(getattr, found, name) for name in names}
    result |= {
        "sample": sample,
        # The samples of Wishart edit what their own derivative needs.
        "rsample": found.rsample((2,)) if found.has_rsample and name != "Wishart" else None,
        "log_prob": found.log_prob(sample),
        "entropy": attempt(found.entropy),
        "perplexity": attempt(found.perplexity),
        "cdf": attempt(cumulative, found, sample),
        "icdf": attempt(lambda: found.icdf(torch.full(found.batch_shape, 0.3))),
        "support": found.enumerate_support() if found.has_enumerate_support else None,
        "kl": attempt(distributions.kl_divergence, found, found.expand(found.batch_shape)),
    }
    if found.batch_shape:
        result["independent"] = distributions.Independent(found, 1).log_prob(sample)
    return result


def cumulative(found, sample):
    probability = found.cdf(sample)
    # Torch has no derivative of the incomplete gamma function.
    return probability.detach() if isinstance(found, (distributions.Gamma, distributions.InverseGamma)) else probability


# The normaliser cancels where probabilities are close to 1/2: few digits are right, with and without the stabiliser.
CANCELLING = {"ContinuousBernoulli"}


class TestDistributions:
    def test_none_is_left_out(self):
        kinds = [getattr(distributions, name) for name in distributions.__all__]
        found = {
            kind.__name__ for kind in kinds if isinstance(kind, type) and issubclass(kind, distributions.Distribution)
        }
        assert found - ABSTRACT <= DISTRIBUTIONS.keys()

    def leaves(self, domains):
        return [leaf(3, COLUMNS, seed=seed) for seed in range(len(domains))]

    @pytest.mark.parametrize(("name", "domains"), DISTRIBUTION_CASES)
    def test_plain_parameters(self, name, domains):
        values = list(map(made, domains.values(), self.leaves(domains)))
        leaves = [value.detach().requires_grad_() for value in values]
        step = differentiated(lambda *mine: all_of(name, distribution(name, domains, mine)), *leaves)
        compare(step, rounding=None if name in CANCELLING else 1e-5)

    @pytest.mark.parametrize(("name", "domains"), DISTRIBUTION_CASES)
    def test_parameters_that_are_computed(self, name, domains):
        def run(*leaves):
            return all_of(name, distribution(name, domains, list(map(made, domains.values(), leaves))))

        compare(differentiated(run, *self.leaves(domains)), rounding=None if name in CANCELLING else 1e-5)

    @pytest.mark.parametrize(("name", "domains"), DISTRIBUTION_CASES)
    def test_parameters_near_their_limits(self, name, domains, monkeypatch):
        monkeypatch.setattr(distributions.Distribution, "_validate_args", False)

        def run(*leaves):
            found = distribution(
                name,
                domains,
                [made(domain, value * 30) for domain, value in zip(domains.values(), leaves, strict=True)],
            )
            return {"log_prob": found.log_prob(sample), "entropy": attempt(found.entropy)}

        sample = distribution(name, domains, list(map(made, domains.values(), self.leaves(domains)))).sample()
        step = differentiated(run, *self.leaves(domains))
        try:
            step()
        except (RuntimeError, ValueError) as error:
            pytest.skip(f"torch itself: {error}")
        compare(step, rounding=None)

    @pytest.mark.parametrize(("first", "second"), distributions.kl._KL_REGISTRY, ids=lambda kind: kind.__name__)
    @pytest.mark.parametrize("computed", [False, True], ids=["plain", "computed"])
    def test_divergence(self, first, second, computed):
        names = [name for name in (first.__name__, second.__name__) if name in DISTRIBUTIONS]
        if len(names) < 2:
            pytest.skip("abstract")
        places = [(name, key, domain) for name in names for key, domain in DISTRIBUTIONS[name][0].items()]
        leaves = [leaf(3, COLUMNS, seed=seed) for seed in range(len(places))]
        if not computed:
            leaves = [made(domain, x).detach().requires_grad_() for (*_, domain), x in zip(places, leaves, strict=True)]

        if "TransformedDistribution" in names:
            pytest.skip("only between equal transforms")

        def run(*mine):
            values = [made(domain, x) if computed else x for (*_, domain), x in zip(places, mine, strict=True)]
            split = len(DISTRIBUTIONS[names[0]][0])
            pair = [
                distribution(name, DISTRIBUTIONS[name][0], half)
                for name, half in zip(names, (values[:split], values[split:]), strict=True)
            ]
            return distributions.kl_divergence(*pair)

        compare(differentiated(run, *leaves), rounding=None if CANCELLING & {*names} else 1e-5)


# --- torchmetrics -----------------------------------------------------------------------------------------------------

torchmetrics = pytest.importorskip("torchmetrics")

SAMPLES = 12
GROUPS = integers(2, SAMPLES, seed=4)
TARGETS = integers(CLASSES, SAMPLES)
MANY = integers(2, SAMPLES, CLASSES)
# For each kind of classification: the shape of the predictions, the domains they may come from, and the targets.
CLASSIFIERS = {
    "Binary": ((SAMPLES,), ["real", "unit", "simplex"], integers(2, SAMPLES), {}),
    "Multiclass": ((SAMPLES, CLASSES), ["real", "simplex", "by hand"], TARGETS, {"num_classes": CLASSES}),
    "Multilabel": ((SAMPLES, CLASSES), ["real", "unit"], MANY, {"num_labels": CLASSES}),
}
# What they are made with, and what they are called with besides predictions and targets.
CLASSIFIER_ARGUMENTS = {
    "FBetaScore": ({"beta": 0.5}, []),
    "Fairness": ({"num_groups": 2}, [GROUPS]),
    "GroupStatRates": ({"num_groups": 2}, [GROUPS]),
    "PrecisionAtFixedRecall": ({"min_recall": 0.5}, []),
    "RecallAtFixedPrecision": ({"min_precision": 0.5}, []),
    "SensitivityAtSpecificity": ({"min_specificity": 0.5}, []),
    "SpecificityAtSensitivity": ({"min_sensitivity": 0.5}, []),
}
CLASSIFIER_CASES = [
    pytest.param(kind, domain, cls, id=f"{cls}-{domain}")
    for kind, (_, domains, *_) in CLASSIFIERS.items()
    for cls in torchmetrics.classification.__all__
    if cls.startswith(kind) and cls != kind
    for domain in domains
]
POSITIVE = ["positive", "simplex", "by hand"]
ANY = ["real", *POSITIVE]
OTHER = soft().flatten()
LOGS = ["log", "log by hand"]
SMALL_IMAGES = (2, 3, 24, 24)
LARGE_IMAGES = (2, 3, 48, 48)
WAVES = (2, 2, 200)
MAPS = (2, CLASSES, 4, 4)


def uniform(*shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


PARTITIONS = {
    "clustering": "AdjustedMutualInfoScore AdjustedRandScore CompletenessScore FowlkesMallowsIndex HomogeneityScore "
    "MutualInfoScore NormalizedMutualInfoScore RandScore VMeasureScore",
    "nominal": "CramersV PearsonsContingencyCoefficient TheilsU TschuprowsT",
}
# Each with its arguments, the shape of the predictions, the domains that they come from, and what comes after them.
METRICS = {
    "regression.ConcordanceCorrCoef": ({}, (24,), ANY, [OTHER]),
    "regression.ContinuousRankedProbabilityScore": ({}, (ROWS, COLUMNS), ANY, [uniform(ROWS)]),
    "regression.CosineSimilarity": ({}, (ROWS, COLUMNS), ANY, [soft()]),
    "regression.CriticalSuccessIndex": ({"threshold": 0.3}, (24,), ANY, [OTHER]),
    "regression.ExplainedVariance": ({}, (24,), ANY, [OTHER]),
    "regression.JensenShannonDivergence": ({}, (ROWS, COLUMNS), ["simplex", "by hand"], [soft()]),
    "regression.JensenShannonDivergence of logarithms": ({"log_prob": True}, (ROWS, COLUMNS), LOGS, [soft().log()]),
    "regression.KLDivergence": ({}, (ROWS, COLUMNS), ["positive", "simplex", "by hand"], [soft()]),
    "regression.KLDivergence of logarithms": ({"log_prob": True}, (ROWS, COLUMNS), LOGS, [soft().log()]),
    "regression.KendallRankCorrCoef": ({}, (24,), ANY, [OTHER]),
    "regression.LogCoshError": ({}, (24,), ANY, [OTHER]),
    "regression.MeanAbsoluteError": ({}, (24,), ANY, [OTHER]),
    "regression.MeanAbsolutePercentageError": ({}, (24,), ANY, [OTHER]),
    "regression.MeanSquaredError": ({"squared": False}, (24,), ANY, [OTHER]),
    "regression.MeanSquaredLogError": ({}, (24,), POSITIVE, [OTHER]),
    "regression.MinkowskiDistance": ({"p": 3}, (24,), ANY, [OTHER]),
    "regression.NormalizedRootMeanSquaredError": ({}, (24,), ANY, [OTHER]),
    "regression.PearsonCorrCoef": ({}, (24,), ANY, [OTHER]),
    "regression.R2Score": ({}, (24,), ANY, [OTHER]),
    "regression.RelativeSquaredError": ({}, (24,), ANY, [OTHER]),
    "regression.SpearmanCorrCoef": ({}, (24,), ANY, [OTHER]),
    "regression.SymmetricMeanAbsolutePercentageError": ({}, (24,), ANY, [OTHER]),
    "regression.TweedieDevianceScore": ({"power": 1}, (24,), POSITIVE, [OTHER]),
    "regression.TweedieDevianceScore of gamma": ({"power": 2}, (24,), POSITIVE, [OTHER]),
    "regression.TweedieDevianceScore between": ({"power": 1.5}, (24,), POSITIVE, [OTHER]),
    "regression.WeightedMeanAbsolutePercentageError": ({}, (24,), ANY, [OTHER]),
    "text.Perplexity": ({}, (2, ROWS, COLUMNS), ["real"], [integers(COLUMNS, 2, ROWS)]),
    "text.Perplexity that ignores": ({"ignore_index": 1}, (2, ROWS, COLUMNS), ["real", "log"], [integers(COLUMNS, 2, ROWS)]),
    "text.Perplexity of probabilities": ({}, (2, ROWS, COLUMNS), ["simplex", "by hand"], [integers(COLUMNS, 2, ROWS)]),
    "retrieval.RetrievalAUROC": ({}, (SAMPLES,), ["unit", "simplex"], [integers(2, SAMPLES)]),
    "retrieval.RetrievalFallOut": ({}, (SAMPLES,), ["unit", "simplex"], [integers(2, SAMPLES)]),
    "retrieval.RetrievalHitRate": ({}, (SAMPLES,), ["unit", "simplex"], [integers(2, SAMPLES)]),
    "retrieval.RetrievalMAP": ({}, (SAMPLES,), ["unit", "simplex"], [integers(2, SAMPLES)]),
    "retrieval.RetrievalMRR": ({}, (SAMPLES,), ["unit", "simplex"], [integers(2, SAMPLES)]),
    "retrieval.RetrievalNormalizedDCG": ({}, (SAMPLES,), ["unit", "simplex"], [integers(4, SAMPLES)]),
    "retrieval.RetrievalPrecision": ({}, (SAMPLES,), ["unit", "simplex"], [integers(2, SAMPLES)]),
    "retrieval.RetrievalPrecisionRecallCurve": ({}, (SAMPLES,), ["unit"], [integers(2, SAMPLES)]),
    "retrieval.RetrievalRPrecision": ({}, (SAMPLES,), ["unit", "simplex"], [integers(2, SAMPLES)]),
    "retrieval.RetrievalRecall": ({}, (SAMPLES,), ["unit", "simplex"], [integers(2, SAMPLES)]),
    "image.ErrorRelativeGlobalDimensionlessSynthesis": ({}, SMALL_IMAGES, ["unit", "simplex"], [uniform(*SMALL_IMAGES)]),
    "image.MultiScaleStructuralSimilarityIndexMeasure": (
        {"data_range": 1.0, "kernel_size": 3, "betas": (0.5, 0.5), "normalize": "relu"},
        LARGE_IMAGES, ["unit"], [uniform(*LARGE_IMAGES)]),
    "image.PeakSignalNoiseRatio": ({"data_range": 1.0}, SMALL_IMAGES, ["unit", "simplex"], [uniform(*SMALL_IMAGES)]),
    "image.PeakSignalNoiseRatioWithBlockedEffect": ({"data_range": 1.0}, (2, 1, 24, 24), ["unit"], [uniform(2, 1, 24, 24)]),
    "image.RelativeAverageSpectralError": ({}, SMALL_IMAGES, ["unit", "simplex"], [uniform(*SMALL_IMAGES)]),
    "image.RootMeanSquaredErrorUsingSlidingWindow": ({}, SMALL_IMAGES, ["unit"], [uniform(*SMALL_IMAGES)]),
    "image.SpatialCorrelationCoefficient": ({}, SMALL_IMAGES, ["unit"], [uniform(*SMALL_IMAGES)]),
    "image.SpectralAngleMapper": ({}, SMALL_IMAGES, ["unit", "simplex"], [uniform(*SMALL_IMAGES)]),
    "image.SpectralDistortionIndex": ({}, SMALL_IMAGES, ["unit"], [uniform(*SMALL_IMAGES)]),
    "image.StructuralSimilarityIndexMeasure": ({"data_range": 1.0}, SMALL_IMAGES, ["unit"], [uniform(*SMALL_IMAGES)]),
    "image.TotalVariation": ({}, SMALL_IMAGES, ["unit", "simplex"], []),
    "image.UniversalImageQualityIndex": ({}, SMALL_IMAGES, ["unit"], [uniform(*SMALL_IMAGES)]),
    "image.VisualInformationFidelity": ({}, LARGE_IMAGES, ["sampled"], [uniform(*LARGE_IMAGES)]),
    "audio.ComplexScaleInvariantSignalNoiseRatio": ({}, (2, 5, 9, 2), ["real"], [uniform(2, 5, 9, 2)]),
    "audio.PermutationInvariantTraining": (
        {"metric_func": torchmetrics.functional.scale_invariant_signal_noise_ratio},
        WAVES, ["real", "unit"], [uniform(*WAVES)]),
    "audio.ScaleInvariantSignalDistortionRatio": ({}, WAVES, ["real", "simplex"], [uniform(*WAVES)]),
    "audio.ScaleInvariantSignalNoiseRatio": ({}, WAVES, ["real", "simplex"], [uniform(*WAVES)]),
    "audio.SignalDistortionRatio": ({"filter_length": 16}, WAVES, ["real"], [uniform(*WAVES)]),
    "audio.SignalNoiseRatio": ({}, WAVES, ["real", "simplex"], [uniform(*WAVES)]),
    "audio.SourceAggregatedSignalDistortionRatio": ({}, WAVES, ["real"], [uniform(*WAVES)]),
    "clustering.CalinskiHarabaszScore": ({}, (SAMPLES, CLASSES), ["real", "simplex"], [TARGETS]),
    "clustering.DaviesBouldinScore": ({}, (SAMPLES, CLASSES), ["sampled"], [TARGETS]),
    "clustering.DunnIndex": ({}, (SAMPLES, CLASSES), ["real", "simplex"], [TARGETS]),
    **{
        f"{family}.{name}": ({"num_classes": CLASSES} if family == "nominal" else {}, (SAMPLES, CLASSES), ["picked"], [TARGETS])
        for family, names in PARTITIONS.items()
        for name in names.split()
    },
    "nominal.FleissKappa": ({"mode": "probs"}, (SAMPLES, CLASSES, 3), ["real", "simplex"], []),
    "segmentation.GeneralizedDiceScore": ({"num_classes": CLASSES}, MAPS, ["hot"], [integers(2, *MAPS)]),
    "segmentation.MeanIoU": ({"num_classes": CLASSES}, MAPS, ["hot"], [integers(2, *MAPS)]),
    "aggregation.CatMetric": ({}, (SAMPLES,), ANY, []),
    "aggregation.MaxMetric": ({}, (SAMPLES,), ANY, []),
    "aggregation.MeanMetric": ({}, (SAMPLES,), [*ANY, "log"], [uniform(SAMPLES)]),
    "aggregation.MinMetric": ({}, (SAMPLES,), ANY, []),
    "aggregation.RunningMean": ({"window": 2}, (SAMPLES,), ANY, []),
    "aggregation.SumMetric": ({}, (SAMPLES,), ANY, []),
}  # fmt: skip
PARAMETERS["sampled"] = lambda x: torch.sigmoid(x.detach())
PARAMETERS["picked"] = lambda x: torch.softmax(x, -1).argmax(-1)
PARAMETERS["hot"] = lambda x: (torch.softmax(x, 1) > 0.4).long()
METRIC_CASES = [
    pytest.param(name, domain, id=f"{name}-{domain}")
    for name, (_, _, domains, _) in METRICS.items()
    for domain in domains
]


def watched(metric, domain, shape, *rest):
    """What a metric says of two batches, each at a time and all together, with derivatives."""

    def run(*leaves):
        mine = copy.deepcopy(metric)
        each = [mine(made(domain, x), *rest) for x in leaves]
        return {"each": each, "all": mine.compute(), "state": mine.metric_state}

    return compare(differentiated(run, leaf(*shape, seed=1), leaf(*shape, seed=2)), unit=1.0)


class TestMetrics:
    @pytest.mark.parametrize(("kind", "domain", "name"), CLASSIFIER_CASES)
    def test_classification(self, kind, domain, name):
        shape, _, targets, sizes = CLASSIFIERS[kind]
        arguments, rest = CLASSIFIER_ARGUMENTS.get(name.removeprefix(kind), ({}, []))
        metric = getattr(torchmetrics.classification, name)(**sizes, **arguments)
        rules = watched(metric, domain, shape, targets, *rest)
        assert rules == {"NG201"} if domain == "by hand" else not rules

    @pytest.mark.parametrize(("name", "domain"), METRIC_CASES)
    def test_others(self, name, domain):
        family, _, rest = name.partition(".")
        arguments, shape, _, more = METRICS[name]
        module = importlib.import_module(f"torchmetrics.{family}")
        metric = getattr(module, rest.partition(" ")[0])(**arguments)
        queries = [integers(3, *shape)] if family == "retrieval" else []
        rules = watched(metric, domain, shape, *more, *queries)
        assert rules or "Perplexity" not in name or domain == "log"

    def test_collection_and_wrappers(self):
        single = torchmetrics.classification.MulticlassAccuracy(CLASSES)
        metrics = torchmetrics.MetricCollection(
            {
                "plain": single,
                "curve": torchmetrics.classification.MulticlassAUROC(CLASSES, thresholds=5),
                "f1": torchmetrics.classification.MulticlassF1Score(CLASSES),
                "classes": torchmetrics.ClasswiseWrapper(
                    torchmetrics.classification.MulticlassRecall(CLASSES, average=None)
                ),
                "extremes": torchmetrics.MinMaxMetric(single),
                "samples": torchmetrics.BootStrapper(single, num_bootstraps=3),
            }
        )

        def run():
            mine = copy.deepcopy(metrics)
            each = [mine(made("simplex", leaf(SAMPLES, CLASSES, seed=seed)), TARGETS) for seed in (1, 2)]
            return {"each": each, "all": mine.compute()}

        assert not compare(run)
