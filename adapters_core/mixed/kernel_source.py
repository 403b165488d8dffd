"""The CUDA source of the kernel that adds the low-rank terms of rows of any layouts. Knows no MLX arrays.

Sizes, ranks and offsets come from the tables of launches.py, so that the text depends on types and on how
many stacks it may be given, and can be compiled before any adapter comes. It is kept short because MLX reads
it again for each launch.
"""

from __future__ import annotations

import mlx.core as mx

from .cuda import TYPES, Text, named
from .launches import STACK_NUMBERS, TABLE_START

__all__ = ["LARGEST_RANK", "add_source", "of_stack", "rank_class"]

_VECTOR_BYTES = 16
_RANKS = (512, 4096)  # for which a block has room: two floats each, of its 48 KiB
LARGEST_RANK = _RANKS[-1]

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
template<int AC,int V,int XW,class TX,class TA>__device__ __forceinline__ void shrink(
const TX*xr,const TA*a,int K,int PR,int k0,int k1,int lane,int warp,int W,float*part){
for(int j0=0;warp+j0*W<PR;j0+=AC){
float acc[AC]={};
#pragma unroll 4
for(int k=k0+lane;k<k1;k+=32){
const auto xu=load<XW>(xr+long(k)*V);
Raw<4> au[AC];
#pragma unroll
for(int j=0;j<AC;++j)au[j]=load<4>(a+long(min(warp+(j0+j)*W,PR-1))*K+long(k)*V);
float xf[V];
widen(xu,xf,TX());
#pragma unroll
for(int j=0;j<AC;++j){
float af[V];
widen(au[j],af,TA());
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
}
"""

# Two blocks of a multiprocessor hide each other's waits. The attributes go to the function that MLX writes.
_ATTRIBUTES = """#undef __global__
#define __global__ __attribute__((global)) __attribute__((launch_bounds({threads},2))) {cluster}
"""

_SHRINK = """__shared__ float part[CAP];
__shared__ float h[CAP];
const int row=blockIdx.y,g=blockIdx.x,t=threadIdx.x,lane=t%32,warp=t/32;
const int stack=rows[4*row];
const float weight=__int_as_float(rows[4*row+2]);
const int*of=table+START+NUMBERS*max(stack,0);
const TA*base=BASE+long(rows[4*row+1])*of[0];
const int K=table[3],PR=of[1];
if(stack>=0){
const int each=(K/V+KS-1)/KS;
const int k0=KS>1?g*each:0,k1=min(k0+each,K/V);
const TX*xr=x+long(row)*K;
if(PR<=2*W)graft::shrink<2,V,XW>(xr,base,K,PR,k0,k1,lane,warp,W,part);
else if(PR<=4*W)graft::shrink<4,V,XW>(xr,base,K,PR,k0,k1,lane,warp,W,part);
else if(PR<=6*W)graft::shrink<6,V,XW>(xr,base,K,PR,k0,k1,lane,warp,W,part);
else graft::shrink<8,V,XW>(xr,base,K,PR,k0,k1,lane,warp,W,part);
}
"""

# Blocks of one cluster have the same row, so that all of them or none meet here.
_SUM_OF_CLUSTER = """const auto cluster=cg::this_cluster();
if(stack>=0){
cluster.sync();
for(int r=t;r<PR;r+=TH){
float s=0.f;
#pragma unroll
for(int c=0;c<KS;++c)s+=cluster.map_shared_rank(part,c)[r];
h[r]=s*weight;
}
cluster.sync();
}
"""

_SUM_OF_BLOCK = """if(stack>=0){
__syncthreads();
for(int r=t;r<PR;r+=TH)h[r]=part[r]*weight;
__syncthreads();
}
"""

_EXPAND = """const int v0=table[0]/V,v1=v0+table[1]/V,total=v1+table[2]/V;
const int share=(total+BLOCKS-1)/BLOCKS,last=min((g+1)*share,total);
for(int i=g*share+t;i<last;i+=TH){
const int p=(i>=v0)+(i>=v1),on=table[p],c=(i-(p==0?0:p==1?v0:v1))*V;
const long at=long(row)*on+c;
const auto yu=graft::load<XW>((p==0?y0:p==1?y1:y2)+at);
TX*to=(p==0?o0:p==1?o1:o2)+at;
const int R=stack>=0?of[4+4*p]:0;
if(R==0){graft::store<XW>(to,yu);continue;}
const float*hp=h+of[5+4*p];
const TA*b=base+of[6+4*p]+c;
const int f0=of[7+4*p];
float v[V],s[V]={};
graft::widen(yu,v,TX());
for(int r0=0;r0<R;r0+=8){
graft::Raw<4> bu[8];
#pragma unroll
for(int r=0;r<8;++r)bu[r]=graft::load<4>(b+long(min(r0+r,R-1))*on);
#pragma unroll
for(int r=0;r<8;++r)if(r0+r<R){
float bf[V];
graft::widen(bu[r],bf,TA());
#pragma unroll
for(int e=0;e<V;++e)s[e]+=hp[r0+r]*bf[e];
}}
#pragma unroll
for(int e=0;e<V;++e)v[e]+=float(TX(s[e]));
if(f0>=0){
float f[V];
graft::widen(graft::load<4>(base+f0+c),f,TA());
#pragma unroll
for(int e=0;e<V;++e)v[e]=f[e]*float(TX(v[e]));
}
union{TX x[V];graft::Raw<XW> raw;}out;
#pragma unroll
for(int e=0;e<V;++e)out.x[e]=TX(v[e]);
graft::store<XW>(to,out.raw);
}
"""


def add_source(
    dtype: mx.Dtype, factors: mx.Dtype, stacks: int, ranks: int, threads: int, blocks: int, clusters: bool
) -> Text:
    """The text for inputs and outputs of `dtype`, factors of `factors`, and at most so many stacks.

    `ranks` is a `rank_class`. The grid is (threads·blocks, rows, 1), in groups of (threads, 1, 1).
    """
    width = _VECTOR_BYTES // factors.size
    cluster = f"__attribute__((cluster_dims({blocks},1,1)))" if clusters else ""
    header = _HEADER + _ATTRIBUTES.format(threads=threads, cluster=cluster)
    constants = f"""using TX={TYPES[dtype]};
using TA={TYPES[factors]};
constexpr int V={width},XW={width * dtype.size // 4},CAP={ranks},TH={threads},W={threads // 32};
constexpr int BLOCKS={blocks},KS={blocks if clusters else 1},START={TABLE_START},NUMBERS={STACK_NUMBERS};
"""
    shrink = _SHRINK.replace("BASE", of_stack(stacks))
    body = constants + shrink + (_SUM_OF_CLUSTER if clusters else _SUM_OF_BLOCK) + _EXPAND
    return named("add", header, body)


def of_stack(stacks: int) -> str:
    """The expression for the slab of the stack whose number is `stack`."""
    return "(" + "".join(f"stack=={at}?s{at}:" for at in range(1, stacks)) + "s0)"


def rank_class(rank: int) -> int:
    """The least of the ranks that a text may be made for which is not below `rank`, at most LARGEST_RANK."""
    return next(one for one in _RANKS if rank <= one)
