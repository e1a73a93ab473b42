"""CPU forms of the Triton kernels that vLLM's Model Runner V2 reaches with method eagle3, so that it needs no Triton.

One file for each module of upstream, each function with the name and the parameters of the kernel that it stands in
for, registered through vLLM's own registry (`vllm.triton_utils.dispatcher`). The registry passes on no launch grid:
numbers of requests are read from shapes. Strides and block sizes are ignored.
"""
