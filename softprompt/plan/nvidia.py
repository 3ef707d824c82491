"""Descriptions of NVIDIA cards for XLA's compiler, in the text form of its protocol buffers.

The names of the fields come from XLA's message `GpuTargetConfigProto`. The values are the
properties that the CUDA driver reports for each card, as in NVIDIA's CUDA programming guide.
"""

_CARD = """
gpu_device_info {{
  name: "{name}"
  cuda_compute_capability {{ major: {major} minor: 0 }}
  core_count: {cores}
  fpus_per_core: {units}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  shared_memory_per_core: {shared}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  runtime_version: "12.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""

TARGETS = {
    "h100": _CARD.format(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        cores=132,
        units=128,
        clock=1.98,
        memory=84_942_979_072,
        bandwidth=3_352_320_000_000,
        cache=52_428_800,
        shared=233_472,
        shared_block=232_448,
    ),
    "a100": _CARD.format(
        name="NVIDIA A100-SXM4-80GB",
        major=8,
        cores=108,
        units=64,
        clock=1.41,
        memory=85_100_068_864,
        bandwidth=2_039_040_000_000,
        cache=41_943_040,
        shared=167_936,
        shared_block=166_912,
    ),
}
"""The description of each card in the table of hardware, by its name there."""
