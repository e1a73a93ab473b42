"""CPU forms of the Triton kernels that vLLM's Model Runner V2 launches with method eagle3, so that it needs no Triton.

There is one file for each module of upstream. A function has the name and the parameters of the kernel that it
replaces, and vLLM's own registry calls it (`vllm.triton_utils.dispatcher`). The registry does not pass on the launch
grid, so numbers of requests are read from shapes. Strides and block sizes are ignored.
"""
