"""The CUDA source of the fused kernel for one shape of group. Text in, text out; knows no MLX arrays.

Sizes are constants of the source rather than arguments, which costs one compilation for each shape of group
and spares arguments in every launch. The text is kept short because MLX reads it again for each launch.
"""

from __future__ import annotations

import mlx.core as mx

from .cuda import TYPES, Text, named
from .layout import GroupLayout

__all__ = ["kernel_source"]

_VECTOR_BYTES = 16
_ACCUMULATORS = 8  # dot products that a warp computes at a time, and rows of B that a thread loads at a time

_HEADER = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
namespace graft{
template<int W>struct Raw{unsigned q[W];};
template<int W>__device__ __forceinline__ Raw<W> load(const void*p){
Raw<W> r;
if constexpr(W==4){
const uint4 u=__ldg(reinterpret_cast<const uint4*>(p));
r.q[0]=u.x;r.q[1]=u.y;r.q[2]=u.z;r.q[3]=u.w;
}else{
const uint2 u=__ldg(reinterpret_cast<const uint2*>(p));
r.q[0]=u.x;r.q[1]=u.y;
}
return r;}
template<int W>__device__ __forceinline__ void store(void*p,const Raw<W>&r){
if constexpr(W==4)*reinterpret_cast<uint4*>(p)=make_uint4(r.q[0],r.q[1],r.q[2],r.q[3]);
else *reinterpret_cast<uint2*>(p)=make_uint2(r.q[0],r.q[1]);}
template<int W>__device__ __forceinline__ void widen(const Raw<W>&r,float*f,__nv_bfloat16){
#pragma unroll
for(int i=0;i<W;++i){f[2*i]=__uint_as_float(r.q[i]<<16);f[2*i+1]=__uint_as_float(r.q[i]&0xffff0000u);}}
template<int W>__device__ __forceinline__ void widen(const Raw<W>&r,float*f,__half){
#pragma unroll
for(int i=0;i<W;++i){
const float2 v=__half22float2(*reinterpret_cast<const __half2*>(&r.q[i]));
f[2*i]=v.x;f[2*i+1]=v.y;
}}
template<int W>__device__ __forceinline__ void widen(const Raw<W>&r,float*f,float){
#pragma unroll
for(int i=0;i<W;++i)f[i]=__uint_as_float(r.q[i]);}
}
"""

# Two blocks of a multiprocessor hide each other's waits. The attributes go to the function that MLX writes.
_ATTRIBUTES = """#undef __global__
#define __global__ __attribute__((global)) __attribute__((launch_bounds({threads},2))) {cluster}
"""

_SHRINK = """if(slot>=0){
constexpr int each=(K/V+KS-1)/KS;
const int k0=KS>1?g*each:0,k1=min(k0+each,K/V);
const TX*xr=x+long(row)*K;
for(int j0=0;j0<WR;j0+=AC){
float acc[AC]={};
#pragma unroll 4
for(int k=k0+lane;k<k1;k+=32){
const auto xu=graft::load<XW>(xr+long(k)*V);
graft::Raw<4> au[AC];
#pragma unroll
for(int j=0;j<AC;++j)au[j]=graft::load<4>(base+long(min(warp+(j0+j)*W,PR-1))*K+long(k)*V);
float xf[V];
graft::widen(xu,xf,TX());
#pragma unroll
for(int j=0;j<AC;++j){
float af[V];
graft::widen(au[j],af,TA());
#pragma unroll
for(int e=0;e<V;++e)acc[j]+=af[e]*xf[e];
}}
#pragma unroll
for(int j=0;j<AC;++j){
#pragma unroll
for(int d=16;d>0;d/=2)acc[j]+=__shfl_xor_sync(0xffffffffu,acc[j],d);
const int r=warp+(j0+j)*W;
if(lane==0&&r<PR)part[r]=acc[j];
}}}
"""

_SUM_OF_CLUSTER = """const auto cluster=cg::this_cluster();
cluster.sync();
if(slot>=0)for(int r=t;r<PR;r+=TH){
float s=0.f;
#pragma unroll
for(int c=0;c<KS;++c)s+=cluster.map_shared_rank(part,c)[r];
h[r]=s*weight;
}
cluster.sync();
"""

_SUM_OF_BLOCK = """__syncthreads();
if(slot>=0)for(int r=t;r<PR;r+=TH)h[r]=part[r]*weight;
__syncthreads();
"""

_EXPAND = """const auto yu=graft::load<XW>(yp+at);
float v[V];
graft::widen(yu,v,TX());
if(slot>=0){
float s[V]={};
for(int r0=0;r0<R;r0+=BR){
graft::Raw<4> bu[BR];
#pragma unroll
for(int r=0;r<BR;++r)bu[r]=graft::load<4>(base+b0+long(min(r0+r,R-1))*on+long(i-i0)*V);
#pragma unroll
for(int r=0;r<BR;++r)if(r0+r<R){
float bf[V];
graft::widen(bu[r],bf,TA());
const float hr=h[h0+r0+r];
#pragma unroll
for(int e=0;e<V;++e)s[e]+=hr*bf[e];
}}
#pragma unroll
for(int e=0;e<V;++e)v[e]+=float(TX(s[e]));
"""

_SCALE = """float f[V];
graft::widen(graft::load<4>(base+f0+long(i-i0)*V),f,TA());
#pragma unroll
for(int e=0;e<V;++e)v[e]=f[e]*float(TX(v[e]));
"""

_STORE = """}
union{TX x[V];graft::Raw<XW> raw;}out;
#pragma unroll
for(int e=0;e<V;++e)out.x[e]=TX(v[e]);
graft::store<XW>(op+at,out.raw);
}
"""


def kernel_source(layout: GroupLayout, dtype: mx.Dtype, threads: int, blocks: int, clusters: bool) -> Text:
    """The text for `mx.fast.cuda_kernel`; inputs and outputs have `dtype`.

    The grid is (threads·blocks, rows, 1), in groups of (threads, 1, 1).
    """
    cluster = f"__attribute__((cluster_dims({blocks},1,1)))" if clusters else ""
    header = _HEADER + _ATTRIBUTES.format(threads=threads, cluster=cluster)
    body = (
        _constants(layout, dtype, threads, blocks if clusters else 1)
        + _SHRINK
        + (_SUM_OF_CLUSTER if clusters else _SUM_OF_BLOCK)
        + _loop(layout, blocks)
        + _EXPAND
        + (_SCALE if layout.is_dora else "")
        + _STORE
    )
    return named("add", header, body)


def _constants(layout: GroupLayout, dtype: mx.Dtype, threads: int, parts: int) -> str:
    width = _VECTOR_BYTES // layout.dtype.size
    warps = threads // 32
    per_warp = -(-layout.rank // warps)
    largest = max(projection.rank for projection in layout.projections)
    return f"""using TX={TYPES[dtype]};
using TA={TYPES[layout.dtype]};
constexpr int V={width},XW={width * dtype.size // 4},K={layout.in_size},PR={layout.rank};
constexpr int TH={threads},W={warps};
constexpr int WR={per_warp},AC={min(per_warp, _ACCUMULATORS)},BR={min(largest, _ACCUMULATORS)},KS={parts};
__shared__ float part[PR];
__shared__ float h[PR];
const int row=blockIdx.y,g=blockIdx.x,t=threadIdx.x,lane=t%32,warp=t/32,slot=rows[2*row];
const float weight=__int_as_float(rows[2*row+1]);
const TA*base=slab+long(slot)*{layout.size};
"""


def _loop(layout: GroupLayout, blocks: int) -> str:
    """The head of the loop over a block's share of the outputs, which finds the projection of each vector."""
    width = _VECTOR_BYTES // layout.dtype.size
    total = sum(projection.out_size for projection in layout.projections) // width
    share = -(-total // blocks)
    lines = [
        f"const int last=min((g+1)*{share},{total});",
        f"for(int i=g*{share}+t;i<last;i+=TH){{",
        "int on=0,i0=0,R=0,h0=0;long b0=0,f0=0;const TX*yp=nullptr;TX*op=nullptr;",
    ]
    start = 0
    for index, projection in enumerate(layout.projections):
        factor = layout.factors[projection.path].start if layout.is_dora else 0
        lines.append(
            f"if(i>={start}){{on={projection.out_size};i0={start};R={projection.rank};"
            f"h0={layout.ranks[projection.path].start};b0={layout.b[projection.path].start};f0={factor};"
            f"yp=y{index};op=o{index};}}"
        )
        start += projection.out_size // width
    lines.append("const long at=long(row)*on+long(i-i0)*V;")
    return "\n".join(lines) + "\n"
