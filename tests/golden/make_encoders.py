"""Write weights and outputs of small random prompt encoders of peft (P-tuning): encoders.npz.

Needs torch and peft, in a separate environment. The tests need only the file that this script
writes:

    python tests/golden/make_encoders.py

The name of every array is MLP or LSTM, a slash, and torch's name of the weight. `output` is the
output of the encoder, `[P, D]`. Made with torch 2.13.0, peft 0.21.2.
"""

from pathlib import Path

import numpy as np
import torch
from peft import PromptEncoder, PromptEncoderConfig

HERE = Path(__file__).parent

arrays = {}
for kind in ("MLP", "LSTM"):
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        token_dim=8,
        num_transformer_submodules=1,
        num_attention_heads=1,
        num_layers=1,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=6,
        encoder_num_layers=1 if kind == "LSTM" else 2,
    )
    torch.manual_seed(0)
    encoder = PromptEncoder(config)
    # With peft's small initial weights, wrong outputs would be close to the right ones.
    for weight in encoder.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    output = encoder(torch.arange(3)[None])[0]
    for name, array in [*encoder.state_dict().items(), ("output", output)]:
        arrays[f"{kind}/{name}"] = array.detach().numpy()
np.savez_compressed(HERE / "encoders.npz", **arrays)
