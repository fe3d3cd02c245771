"""Models that consist of several, as vision-language models do: refused by name, and attached to tower by tower."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from qtuning_fast import QTuningConfig, QTuningModel

SMALL = {"prompt_length": 2, "queue_size": 2, "shared_length": 1, "reparameterization": None}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4}
WORDS = {**SIZES, "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**WORDS, "num_key_value_heads": 2}
MROPE = {**GROUPED, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
MARKS = {"image_token_id": 59, "video_token_id": 58, "vision_start_token_id": 57, "vision_end_token_id": 56}
PATCHES = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1}
PATCHES = {**PATCHES, "hidden_size": 32}
AUDIO = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8}
SEQ2SEQ = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 60}
SEQ2SEQ = {**SEQ2SEQ, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "pad_token_id": 0}


def _gemma3() -> Any:
    text = tf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
    sizes = {"image_token_index": 59, "mm_tokens_per_image": 4}
    config = tf.Gemma3Config(vision_config=tf.SiglipVisionConfig(**IMAGE), text_config=text, **sizes)
    return tf.Gemma3ForConditionalGeneration(config)


def _paligemma() -> Any:
    vision = tf.SiglipVisionConfig(**IMAGE, projection_dim=32)
    sizes = {"image_token_index": 59, "projection_dim": 32, "hidden_size": 32}
    text = tf.GemmaConfig(**GROUPED, head_dim=8)
    return tf.PaliGemmaForConditionalGeneration(tf.PaliGemmaConfig(vision_config=vision, text_config=text, **sizes))


def _blip2() -> Any:
    text = tf.OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=60)
    text.word_embed_proj_dim = 32
    bridge = {**SIZES, "vocab_size": 60, "encoder_hidden_size": 32}
    sizes = {"image_token_index": 59, "num_query_tokens": 3}
    config = tf.Blip2Config(vision_config=IMAGE, qformer_config=bridge, text_config=text, **sizes)
    return tf.Blip2ForConditionalGeneration(config)


def _mllama() -> Any:
    vision = {"hidden_size": 32, "attention_heads": 4, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"intermediate_size": 48, "image_size": 8, "patch_size": 4, "intermediate_layers_indices": [0]}
    vision |= {"vision_output_dim": 64, "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {**GROUPED, "cross_attention_layers": [1], "rope_parameters": rope}
    config = tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=59)
    return tf.MllamaForConditionalGeneration(config)


def _two_towers(kind: str) -> Any:
    config = getattr(tf, f"{kind}Config")(text_config=WORDS, vision_config=IMAGE)
    return getattr(tf, f"{kind}Model")(config)


def _qwen(version: str, **vision: Any) -> Any:
    config = getattr(tf, f"Qwen{version}VLConfig")(
        vision_config={**PATCHES, **vision}, text_config={**MROPE, "head_dim": 8}, **MARKS
    )
    return getattr(tf, f"Qwen{version}VLForConditionalGeneration")(config)


def _with_idefics_tower(kind: str) -> Any:
    text = tf.LlamaConfig(**GROUPED)
    config = getattr(tf, f"{kind}Config")(
        vision_config=dict(IMAGE), text_config=text, image_token_id=59, scale_factor=2, pad_token_id=0
    )
    return getattr(tf, f"{kind}ForConditionalGeneration")(config)


def _llava() -> Any:
    vision, text = tf.CLIPVisionConfig(**IMAGE), tf.LlamaConfig(**GROUPED)
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=59))


def _pair() -> Any:
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        tf.ViTConfig(**IMAGE), tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60)
    )
    return tf.VisionEncoderDecoderModel(config)


def _audio() -> Any:
    config = tf.Qwen2AudioConfig(
        audio_config={**AUDIO, "max_source_positions": 10}, text_config=tf.Qwen2Config(**GROUPED), audio_token_index=59
    )
    return tf.Qwen2AudioForConditionalGeneration(config)


def _whisper() -> Any:
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**{**SEQ2SEQ, **AUDIO}))


def _blip() -> Any:
    text = {**WORDS, "encoder_hidden_size": 32}
    return tf.BlipForConditionalGeneration(tf.BlipConfig(vision_config=IMAGE, text_config=text))


# What they read, and the towers that can be attached to: path -> what it reads.
Towers = dict[str, str]
MODELS: dict[str, tuple[Callable[[], Any], str, Towers]] = {
    "LLaVA": (_llava, "text and images", {"model.language_model": "text", "model.vision_tower": "images"}),
    "Gemma 3": (_gemma3, "text and images", {"model.language_model": "text", "model.vision_tower": "images"}),
    "PaliGemma": (_paligemma, "text and images", {"model.language_model": "text", "model.vision_tower": "images"}),
    "BLIP-2": (_blip2, "text and images", {"language_model": "text", "vision_model": "images"}),
    "Idefics 3": (
        lambda: _with_idefics_tower("Idefics3"),
        "text and images",
        {"model.text_model": "text", "model.vision_model": "images"},
    ),
    "SmolVLM": (
        lambda: _with_idefics_tower("SmolVLM"),
        "text and images",
        {"model.text_model": "text", "model.vision_model": "images"},
    ),
    "Qwen2-VL": (lambda: _qwen("2", embed_dim=32), "text, images and videos", {"model.language_model": "text"}),
    "Qwen2.5-VL": (
        lambda: _qwen("2_5_", intermediate_size=48, out_hidden_size=32, window_size=16, fullatt_block_indexes=[1]),
        "text, images and videos",
        {"model.language_model": "text"},
    ),
    "Qwen3-VL": (
        lambda: _qwen(
            "3", intermediate_size=48, out_hidden_size=32, deepstack_visual_indexes=[0], num_position_embeddings=16
        ),
        "text, images and videos",
        {"model.language_model": "text"},
    ),
    "CLIP": (lambda: _two_towers("CLIP"), "text and images", {"text_model": "text", "vision_model": "images"}),
    "SigLIP": (lambda: _two_towers("Siglip"), "text and images", {"text_model": "text", "vision_model": "images"}),
    "ViT and GPT-2": (_pair, "images", {"encoder": "images", "decoder": "text"}),
    "Qwen2-Audio": (_audio, "text and audio", {"model.language_model": "text"}),
}
WRITING = [
    name for name in MODELS if name not in ("CLIP", "SigLIP", "ViT and GPT-2", "Qwen2-Audio")
]  # text and an image in, text out


def built(name: str) -> Any:
    """The model, with weights large enough for differences to show."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def text_tower(name: str) -> str:
    return next(path for path, reads in MODELS[name][2].items() if reads == "text")


def question(name: str) -> dict[str, Tensor]:
    """Two questions, each about an image."""
    pixels, more = torch.randn(2, 3, 8, 8), {}
    tokens = {"BLIP-2": 3, "Idefics 3": 1, "SmolVLM": 1}.get(name, 4)
    ids = torch.tensor([[5, 7, 57, *[59] * tokens, 56, 9, 11], [6, 8, 57, *[59] * tokens, 56, 12, 11]])
    if name.startswith("Qwen"):
        pixels = torch.randn(32, 48)
        more = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (ids == 59).long()}
    if name in ("Idefics 3", "SmolVLM"):
        pixels = pixels[:, None]
    if name == "Gemma 3":
        more = {"token_type_ids": (ids == 59).long()}
    if name == "PaliGemma":
        more = {"token_type_ids": torch.zeros_like(ids)}
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids), **more}


def started(base: Any, **changes: Any) -> QTuningModel:
    """A model in its first task, every parameter of its prefix somewhere at random."""
    model = QTuningModel(base, QTuningConfig(**(SMALL | changes)))
    model.start_task("first", 2)
    with torch.no_grad():
        for parameter in model.training_prefix.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    model.set_task("first")
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_refusal_says_what_the_model_reads_and_names_its_towers(name: str) -> None:
    base = built(name)
    _, reads, towers = MODELS[name]
    with pytest.raises(NotImplementedError) as refusal:
        QTuningModel(base, QTuningConfig(**SMALL))
    message = str(refusal.value)
    assert message.startswith(f"{type(base).__name__} reads {reads} and consists of several models; attach to one of")
    found = [part.split(" ")[0].removeprefix("base_model.") for part in message.split(": ", 1)[1].split(" or ")]
    assert sorted(found) == sorted(towers)
    for path, kind in towers.items():
        tower = base.get_submodule(path)
        assert f"base_model.{path} ({type(tower).__name__}, reads {kind})" in message
        task = "image-classification" if kind == "images" else "sequence-classification"
        assert QTuningModel(tower, QTuningConfig(**SMALL, task_type=task)).detach() is tower


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_whisper, "WhisperModel takes input_features; only text and image models"),
        (
            _mllama,
            "none of them can take a prefix .*vision_model: MllamaVisionModel does not run on pixel_values alone",
        ),
        (_blip, "none of them can take a prefix .*text_decoder: BlipTextModel: 0 of the 2 layers"),
    ],
)
def test_without_such_a_tower_the_reasons_are_given(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(NotImplementedError, match=says):
        QTuningModel(make(), QTuningConfig(**SMALL))


def test_a_reason_is_never_the_error_of_another_line() -> None:
    """An error that the model's own code ends in is the cause of the refusal, not its text."""
    with pytest.raises(NotImplementedError, match=r"^Qwen2Vision\w+ takes hidden_states; only text"):
        QTuningModel(built("Qwen2-VL").model.visual, QTuningConfig(**SMALL))
    with pytest.raises(NotImplementedError, match=r"MllamaVisionModel does not run on pixel_values alone$") as refusal:
        QTuningModel(_mllama().model.vision_model, QTuningConfig(**SMALL))
    assert isinstance(refusal.value.__cause__, TypeError)


@pytest.mark.parametrize("placement", ["prefix", "input"])
@pytest.mark.parametrize("name", WRITING)
def test_a_prefix_of_the_text_tower_reaches_the_whole_model(name: str, placement: str) -> None:
    if (name, placement) == ("PaliGemma", "input"):
        pytest.skip("it gives its text tower complete masks, in front of which no prompt can stand")
    base, inputs = built(name), question(name)
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [56, 57, 58, 59]}  # not images
    with torch.no_grad():
        expected, written = base(**inputs).logits, base.generate(**inputs, **options)
    model = started(base.get_submodule(text_tower(name)), placement=placement)
    output = base(**inputs, labels=inputs["input_ids"])
    assert (output.logits - expected).abs().max() > 0.1
    output.loss.backward()  # a step by the whole model's loss
    trained = {key: p for key, p in model.training_prefix.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    model.train()(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([1])).loss.backward()  # and by its head's
    model.finish_task()
    with torch.no_grad():
        under = base(**inputs).logits
        torch.testing.assert_close(under, output.logits, atol=1e-5, rtol=1e-5)
        found = base.generate(**inputs, **options)
        assert torch.equal(found, base.generate(**inputs, **options, use_cache=False))
        model.set_task(None)
        assert torch.equal(base(**inputs).logits, expected)
        assert torch.equal(base.generate(**inputs, **options), written)


@pytest.mark.parametrize("placement", ["prefix", "input"])
@pytest.mark.parametrize("name", [name for name in WRITING if name != "PaliGemma"])
@torch.no_grad()
def test_padding_of_the_whole_model(name: str, placement: str) -> None:
    """PaliGemma itself gives its text tower position ids that count padding."""
    base, inputs = built(name), question(name)
    started(base.get_submodule(text_tower(name)), placement=placement)
    expected = base(**inputs).logits
    by_token = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    padded = {key: torch.nn.functional.pad(x, (3, 0)) if key in by_token else x for key, x in inputs.items()}
    torch.testing.assert_close(base(**padded).logits[:, 3:], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if "images" in MODELS[name][2].values()])
def test_a_vision_tower_classifies_images(name: str) -> None:
    base = built(name)
    tower = base.get_submodule(next(path for path, reads in MODELS[name][2].items() if reads == "images"))
    model = started(tower, task_type="image-classification")
    pixels, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 1])
    model.train()(pixel_values=pixels, labels=labels).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.training_prefix.parameters() if p.requires_grad)
    model.finish_task()
    with torch.no_grad():
        logits = model.eval()(pixel_values=pixels).logits
        assert not torch.allclose(
            model.features({"pixel_values": pixels}, task=None), model.encode({"pixel_values": pixels})
        )
        torch.testing.assert_close(model(pixel_values=pixels[1:2]).logits, logits[1:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_text_towers_of_pairs_compute_as_with_a_prefix_put_in_by_hand(name: str, by_hand: Any) -> None:
    """CLIP's is causal, though its attention modules do not say so; SigLIP's sees the whole text."""
    base = built(name)
    eager = copy.deepcopy(base.text_model)
    by_hand.compute(eager)
    model = started(base.text_model, gate=None)
    adapter = model.finish_task()
    names = {id(module): path for path, module in base.text_model.named_modules()}
    for layer, key, value in zip(model.backbone.injector.layers, adapter.keys, adapter.values):
        eager.get_submodule(names[id(layer.module)]).by_hand = by_hand.Hand(key=key[None], value=value[None])
    ids, mask = torch.randint(5, 50, (2, 6)), torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    with torch.no_grad():
        expected = eager(input_ids=ids, attention_mask=mask).last_hidden_state
        features = model.encode({"input_ids": ids, "attention_mask": mask})
        found = base.text_model(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(found[mask > 0], expected[mask > 0], atol=1e-5, rtol=1e-5)
        if name == "CLIP":  # its last token, which is the end token
            pooled = torch.stack([expected[0, 3], expected[1, 5]])
        else:
            pooled = torch.stack([expected[0, :4].mean(0), expected[1].mean(0)])
        torch.testing.assert_close(features, torch.nn.functional.rms_norm(pooled, (32,)), atol=1e-5, rtol=1e-5)
        before = base.get_text_features(input_ids=ids, attention_mask=mask)[1]
        model.set_task(None)
        assert not torch.allclose(base.get_text_features(input_ids=ids, attention_mask=mask)[1], before, atol=1e-3)
