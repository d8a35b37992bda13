"""Recurrences and short convolutions over packed rows, with state that restarts at each document.

A state-space model or a linear attention carries a state along the row,

    S[t] = decay[t] S[t-1] + update[t]

and a short convolution reads the last few tokens. In a packed row both must start anew at the first token of a
document. Every function here takes `positions`, (T,), the position of each token in its document, on the device.
Shapes do not depend on the documents, and nothing waits for the device, so a CUDA graph can record them.

    convolution   causal depthwise convolution
    decayed       linear attention with one decay per head: Mamba 2, lightning attention
    delta         gated delta rule, with one decay per head or per channel
    selective     Mamba 1: one decay per channel and state
"""
