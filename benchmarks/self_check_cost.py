# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""Processor seconds that the check of a model at the start takes, with LoRA of rank 16 on it, and what it finds.

python benchmarks/self_check_cost.py MODEL [--dtype float32]
"""

import argparse
import time

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_dro.model.codec import PermutationCodec
from trl_dro.model.rag_model import RAGModel
from trl_dro.model.roles import ROLES, Roles, prepare_role_model
from trl_dro.model.self_check import check_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or auto")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    model = prepare_role_model(base, peft_config=lora)
    codec = PermutationCodec(tokenizer, max_documents=4, num_selected=2)
    for trained in (ROLES, ()):
        roles = Roles(model, trained)
        rag = RAGModel(roles, dict.fromkeys(ROLES, tokenizer), {}, codec, torch.device("cpu"))
        start = time.process_time()
        check_rows(rag, noiseless=bool(trained))
        seconds = time.process_time() - start
        rows = "rows of their own" if roles.separate else "shared rows"
        print(f"{'training' if trained else 'answering'}: {seconds:.2f} s, {rows}")


if __name__ == "__main__":
    main()
