import pytest

from softprompt.plan.collectives import bytes_moved

HLO = """
HloModule test

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%condition (state: (s32[], f32[8])) -> pred[] {
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%fused.1 (p: bf16[4,8]) -> bf16[16,8] {
  ROOT %g = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, MESH
}

%fused.2 (p: bf16[4,8]) -> bf16[16,8] {
  ROOT %g = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, MESH
}

%all-reduce-scatter (p: f32[16]) -> f32[4] {
  %r = f32[16]{0} all-reduce(%p), channel_id=4, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %d = f32[4]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={4}
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[100]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %f1 = bf16[16,8] fusion(%y), kind=kCustom, calls=%fused.1
  %f2 = bf16[16,8] fusion(%y), kind=kCustom, calls=%fused.2
  ROOT %t = (s32[], f32[8]) tuple(%i, %a)
}

%wrapped (p: s8[64]) -> s8[64] {
  ROOT %e = s8[64]{0} all-to-all(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %s = (f32[2,5]{1,0}, f32[16,5]{1,0}) all-gather-start(%p), replica_groups=[1,8]<=[8]
  %d = f32[16,5]{1,0} all-gather-done(%s)
  %w = (s32[], f32[8]) while(%init), condition=%condition, body=%body
  %k = (s32[], f32[8]) while(%init), condition=%condition, body=%body, COUNT
  %c = fusion(%p), kind=kCustom, calls=%all-reduce-scatter
  %q = f32[4] fusion(%p), kind=kCustom, calls=%all-reduce-scatter
  %v = ((s8[64]), s8[64], u32[]) async-start(%p), calls=%wrapped
  %z = s8[64]{0} async-done(%v), calls=%wrapped
  %y = (f32[30]{0}, f32[30]{0}, u32[], u32[]) collective-permute-start(%p)
  ROOT %o = f32[8] add(%p, %p)
}
"""
HLO = HLO.replace("MESH", "replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}")
HLO = HLO.replace("COUNT", 'backend_config={"known_trip_count":{"n":"3"}}')


def test_collectives_are_read_from_the_text_of_a_program():
    assert bytes_moved(HLO, 8) == {
        "all-gather": 16 * 5 * 4 * 7 / 8 + 10 * 16 * 8 * 2 * 3 / 4,
        "all-reduce": 10 * 2 * 400 * 3 / 4,
        "reduce-scatter": 16 * 4 * 3 / 4,
        "all-to-all": 64 / 2,
        "collective-permute": 120,
    }


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="number of runs"):
        bytes_moved(HLO.replace("constant(7)", "parameter(7)"), 8)
