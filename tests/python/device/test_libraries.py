"""Real libraries, as users have them, managed without special code. Each is skipped where it is not installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import sire
import torch
from measure import region_bytes


def needs(*names: str) -> pytest.MarkDecorator:
    """Skips where one of the packages is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(autouse=True)
def torchao() -> None:
    """The others import it where it is installed; a release of it supports the latest releases of PyTorch."""
    if importlib.util.find_spec("torchao") is None:
        return
    try:
        importlib.import_module("torchao.quantization")
    except ImportError as error:
        pytest.skip(f"torchao does not work with PyTorch {torch.__version__}: {error}")


@pytest.fixture(autouse=True)
def pools() -> None:
    """Default pools."""
    sire.setup_default_pools(release="eager")


def tiny_llama() -> Any:
    """A model of a few hundred kilobytes, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@needs("transformers")
def test_generating_with_a_cache() -> None:
    reference = tiny_llama()
    prompt = torch.tensor([[1, 5, 9, 33]])
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = reference.generate(prompt, **settings)
    model = tiny_llama()
    for _ in range(2):
        with sire.auto_manage(model) as wrapper:
            assert model.device.type == "cuda"
            found = model.generate(prompt.to(wrapper.get_execution_device()), **settings)
        assert model.device.type == "cpu"
        assert torch.equal(found.cpu(), expected)
    assert isinstance(sire.manage(model).user, sire.TransformersModelWrapper)
    hook = sire.AutoManageHook.manage_module(model)
    with torch.no_grad():
        logits = model(input_ids=prompt).logits
        assert torch.allclose(logits.cpu(), reference(input_ids=prompt).logits, atol=1e-4)
    hook.remove()


@needs("transformers", "peft")
def test_training_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), settings)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    prompt = torch.tensor([[1, 5, 9, 33, 7, 2]])
    losses = []
    copied = 0
    for _ in range(4):
        with sire.auto_manage(model) as wrapper:
            ids = prompt.to(wrapper.get_execution_device())
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            before = wrapper.user.adopted.bytes_copied
        copied = wrapper.user.adopted.bytes_copied - before
        assert all(each.device.type == "cpu" for each in model.parameters())
    assert losses[-1] < losses[0]
    trained = sum(each.nbytes for each in model.parameters() if each.requires_grad)
    assert copied <= 2 * trained, "frozen weights were copied back"


@needs("transformers", "peft")
def test_a_lora_of_gpt2_is_merged_as_peft_merges_it() -> None:
    """Its layers have weights of (in, out), one of them a square."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from sire.models.commits import CommitObjectProxy, LoraCommit
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2)).eval()
    plain = {name: each.clone() for name, each in model.state_dict().items()}
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    settings.init_lora_weights = False
    adapted = get_peft_model(model, settings)
    lora = {name: each.clone() for name, each in get_peft_model_state_dict(adapted).items()}
    merged = adapted.merge_and_unload().state_dict()
    model = GPT2LMHeadModel(model.config).eval()
    model.load_state_dict(plain)
    assert not torch.allclose(merged["transformer.h.0.attn.c_proj.weight"], plain["transformer.h.0.attn.c_proj.weight"])
    with CommitObjectProxy(model).add_commit(LoraCommit(lora, scale=2.0)):
        for name, each in model.state_dict().items():
            assert torch.allclose(each, merged[name], atol=1e-5), name


def quantized() -> Any:
    """Int8 weights, as torchao quantizes the layers of any model: tensors that are made of other tensors."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)).eval()
    quantize_(model, Int8WeightOnlyConfig())
    assert hasattr(model[0].weight, "__tensor_flatten__")
    return model


@needs("torchao")
def test_a_quantized_model_is_paused_and_comes_back() -> None:
    x = torch.randn(4, 64)
    model = quantized()
    with torch.no_grad():
        expected = quantized()(x)
        for _ in range(3):
            with sire.auto_manage(model) as wrapper:
                assert torch.allclose(model(x.to(wrapper.get_execution_device())).cpu(), expected, atol=1e-5)
                held = wrapper.user.adopted
                assert region_bytes(held.tag)["resident_bytes"] > 0
            assert region_bytes(held.tag)["resident_bytes"] == 0
            assert region_bytes(held.tag)["paused_bytes"] > 0
            assert model[0].weight.is_cuda, "paused, not shown on the host"
        hook = sire.AutoManageHook.manage_module(model)
        assert torch.allclose(model(x).cpu(), expected, atol=1e-5)
        hook.remove()


@needs("torchao")
def test_a_lora_runs_beside_quantized_layers() -> None:
    from sire.models.commits import AutoManageCommitObjectProxy, LoraCommit

    x, down, up = torch.randn(4, 64), torch.randn(4, 64), torch.randn(64, 4)
    lora = LoraCommit({"0.lora_A.weight": down, "0.lora_B.weight": up}, scale=2.0)
    model, plain = quantized(), quantized()
    with torch.no_grad():
        expected = plain[2](torch.relu(plain[0](x) + 2.0 * (x @ down.t() @ up.t())))
        with AutoManageCommitObjectProxy(model).add_commit(lora) as patched:
            assert torch.allclose(patched(x.cuda()).cpu(), expected, atol=1e-3)
        with sire.auto_manage(model):
            assert torch.allclose(model(x.cuda()).cpu(), plain(x), atol=1e-5)


@needs("torchao")
def test_the_memory_manager_leaves_quantized_weights_where_they_are(caplog: pytest.LogCaptureFixture) -> None:
    from sire.memory import MemoryManager

    x = torch.randn(4, 64)
    model = quantized()
    model.append(torch.nn.Linear(32, 32))
    with torch.no_grad():
        expected = model(x)
        with MemoryManager() as manager:
            manager.wrap_model(model)
            assert type(model[0].weight).__name__ in caplog.text
            model.to("cuda")
            assert torch.allclose(model(x.cuda()).cpu(), expected, atol=1e-5)
            manager.offload_all_modules()
            assert model[0].weight.is_cuda
            assert not model[3].weight.is_cuda, "what is plain leaves as ever"
        assert torch.allclose(model(x.to(model[0].weight.device)).cpu(), expected, atol=1e-5)


@needs("diffusers", "transformers")
def test_a_pipeline_whose_models_take_turns() -> None:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    def pipeline() -> Any:
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        made = DDIMPipeline(unet.eval(), DDIMScheduler(num_train_timesteps=10))
        made.set_progress_bar_config(disable=True)
        return made

    settings = {"num_inference_steps": 2, "output_type": "np", "batch_size": 1}
    expected = pipeline()(generator=torch.Generator().manual_seed(3), **settings).images
    managed = pipeline()
    wrapper = sire.manage(managed)
    assert isinstance(wrapper.user, sire.DiffusersPipelineWrapper)
    assert str(managed._execution_device) == "cuda:0"
    found = managed(generator=torch.Generator().manual_seed(3), **settings).images
    assert abs(found - expected).max() < 1e-3
    assert managed.unet.device.type == "cpu"
