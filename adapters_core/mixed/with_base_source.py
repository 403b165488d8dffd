"""The CUDA sources of the kernels that compute base layers together with their adapters. Text in, text out.

Decoding reads every weight once for a handful of rows, so that what counts is to keep reading. For one row,
each warp takes two outputs as matrix times vector. For more, a cluster of eight blocks takes 128 outputs of
one projection and divides the inputs between its blocks. Each warp multiplies 16 rows of W by all rows of the
batch on the tensor cores, straight from memory: the order in which a sum runs over the inputs is free, so
each thread takes 16 bytes in one piece. The parts are added up through distributed shared memory; each block
then adds the low-rank terms of its sixteen outputs and writes them. As in kernel_source.py, what adapters and
layers differ in comes from the tables of launches.py. Knows no MLX arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .cuda import TYPES, Text, named
from .kernel_source import of_stack
from .launches import STACK_NUMBERS, TABLE_START

__all__ = [
    "INPUTS_MULTIPLE",
    "MOST_ROWS",
    "OUTPUTS_PER_CLUSTER",
    "SHRINK_RANKS",
    "THREADS",
    "TILED_ROWS",
    "product_blocks",
    "product_source",
    "shrink_source",
    "unrolled",
]

THREADS = 256
_CLUSTER_BLOCKS = 8
OUTPUTS_PER_CLUSTER = 128  # 16 for each warp of a block
INPUTS_MULTIPLE = 256  # 32 for each block of a cluster at a time
MOST_ROWS = 32
_VECTOR_OUTPUTS = 16  # for each block, where there is one row
SHRINK_RANKS = 2  # rows of A for each block of the first kernel

_KINDS = {mx.bfloat16: "bf16", mx.float16: "f16"}

_HEADER = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
namespace graft{
__device__ __forceinline__ float2 pair(unsigned q,__nv_bfloat16){
return make_float2(__uint_as_float(q<<16),__uint_as_float(q&0xffff0000u));}
__device__ __forceinline__ float2 pair(unsigned q,__half){
return __half22float2(*reinterpret_cast<const __half2*>(&q));}
template<class T>__device__ __forceinline__ uint4 load(const T*p){
return __ldg(reinterpret_cast<const uint4*>(p));}
template<class T>__device__ __forceinline__ void unpack(const uint4&u,float*f,T kind){
const unsigned q[4]={u.x,u.y,u.z,u.w};
#pragma unroll
for(int i=0;i<4;++i){const float2 v=pair(q[i],kind);f[2*i]=v.x;f[2*i+1]=v.y;}}
template<class T>__device__ __forceinline__ void widen(const T*p,float*f){unpack(load(p),f,T());}
__device__ __forceinline__ void widen(const float*p,float*f){
#pragma unroll
for(int i=0;i<2;++i){
const uint4 u=load(p+4*i);
f[4*i]=__uint_as_float(u.x);f[4*i+1]=__uint_as_float(u.y);
f[4*i+2]=__uint_as_float(u.z);f[4*i+3]=__uint_as_float(u.w);
}}
"""

# The weights pass by once; what stays in the nearest cache is the input.
_STREAM = """template<class T>__device__ __forceinline__ uint4 stream(const T*p){
uint4 u;
asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3},[%4];"
:"=r"(u.x),"=r"(u.y),"=r"(u.z),"=r"(u.w):"l"(p));
return u;}
"""

_MULTIPLY = """__device__ __forceinline__ void multiply(
float*c,unsigned a0,unsigned a1,unsigned a2,unsigned a3,unsigned b0,unsigned b1){
asm("mma.sync.aligned.m16n8k16.row.col.f32.KIND.KIND.f32 "
"{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
:"+f"(c[0]),"+f"(c[1]),"+f"(c[2]),"+f"(c[3]):"r"(a0),"r"(a1),"r"(a2),"r"(a3),"r"(b0),"r"(b1));}
"""

_ATTRIBUTES = """#undef __global__
#define __global__ __attribute__((global)) __attribute__((launch_bounds({threads},{blocks}))) {cluster}
"""

# In the texts: T and A are the types of input and factors. K is the inputs; RB the rows of A for a block,
# TH its threads; NT the tiles of eight rows, U the vectors a thread reads ahead, CB the blocks of a cluster
# and BM its outputs. `p` is the projection, `on` its outputs, `w` its weights, `to` what it writes, and
# `first` the number of its first cluster, or block; HS is the stride of h.
_SHRINK = """__shared__ float part[TH/32];
const int row=blockIdx.y,t=threadIdx.x,lane=t%32,warp=t/32,each=TH/RB;
const int stack=rows[4*row];
const int*of=table+START+NUMBERS*max(stack,0);
const int K=table[3],HS=table[4],PR=of[1];
if(stack<0||blockIdx.x*RB>=PR)return;
const int r=blockIdx.x*RB+t/each;
const A*a=BASE+long(rows[4*row+1])*of[0]+long(min(r,PR-1))*K;
const T*xr=x+long(row)*K;
float s=0.f;
#pragma unroll 4
for(int k=t%each;k<K/8;k+=each){
float af[8],xf[8];
graft::widen(a+8*k,af);
graft::widen(xr+8*k,xf);
#pragma unroll
for(int e=0;e<8;++e)s+=af[e]*xf[e];
}
#pragma unroll
for(int d=16;d>0;d/=2)s+=__shfl_xor_sync(0xffffffffu,s,d);
if(lane==0)part[warp]=s;
__syncthreads();
if(t%each==0&&r<PR){
s=0.f;
#pragma unroll
for(int w=0;w<each/32;++w)s+=part[warp+w];
h[row*HS+r]=s*__int_as_float(rows[4*row+2]);
}
"""

# One row: two outputs for each warp, whose next weights are on their way while it multiplies.
_VECTOR = """const int t=threadIdx.x,lane=t%32,half=lane/16;
const long column=long(blockIdx.x-first)*BM+t/32*2;
const T*wr=w+column*K+8*lane;
const T*xr=x+8*lane;
const int stack=rows[0];
const int*of=table+START+NUMBERS*max(stack,0);
const A*base=BASE+long(rows[1])*of[0];
const int R=stack>=0?of[4+4*p]:0,f0=of[7+4*p];
const float*hp=h+of[5+4*p];
const A*b=base+of[6+4*p]+column+half;
uint4 lo[U],hi[U];
#pragma unroll
for(int u=0;u<U;++u){lo[u]=graft::stream(wr+256*u);hi[u]=graft::stream(wr+K+256*u);}
float s=0.f,y0=0.f,y1=0.f;
for(int r=lane%16;r<R;r+=16)s+=hp[r]*float(__ldg(b+long(r)*on));
for(int k=0;k<K;k+=256*U){
uint4 nlo[U],nhi[U];
const int next=k+256*U<K?k+256*U:0;
#pragma unroll
for(int u=0;u<U;++u){nlo[u]=graft::stream(wr+next+256*u);nhi[u]=graft::stream(wr+K+next+256*u);}
#pragma unroll
for(int u=0;u<U;++u){
float xf[8],f[8];
graft::widen(xr+k+256*u,xf);
graft::unpack(lo[u],f,T());
#pragma unroll
for(int e=0;e<8;++e)y0+=f[e]*xf[e];
graft::unpack(hi[u],f,T());
#pragma unroll
for(int e=0;e<8;++e)y1+=f[e]*xf[e];
lo[u]=nlo[u];hi[u]=nhi[u];
}}
#pragma unroll
for(int d=16;d>0;d/=2){
y0+=__shfl_xor_sync(0xffffffffu,y0,d);
y1+=__shfl_xor_sync(0xffffffffu,y1,d);
if(d<16)s+=__shfl_xor_sync(0xffffffffu,s,d);
}
if(lane%16==0){
T out=T(float(T(half?y1:y0))+float(T(s)));
if(R>0&&f0>=0)out=T(float(__ldg(base+f0+column+half))*float(out));
to[column+half]=out;
}
"""

# A warp multiplies 16 outputs by 8 rows and 16 inputs at a time: thread 4g+q has outputs g and g+8 of W, row
# g of x, and of the sums rows 2q and 2q+1.
_PRODUCT = """__shared__ __align__(16) float part[8*NT][BM+4];
__shared__ const A*bs[8*NT];
__shared__ const A*fs[8*NT];
__shared__ int rs[8*NT],hs[8*NT];
if(threadIdx.x<8*NT){
const int row=threadIdx.x,stack=row<rows_shape[0]?rows[4*row]:-1;
const int*of=table+START+NUMBERS*max(stack,0);
const A*base=BASE;
int R=0;
if(stack>=0){
base+=long(rows[4*row+1])*of[0];
R=of[4+4*p];
}
rs[row]=R;hs[row]=row*HS+of[5+4*p];
bs[row]=base+of[6+4*p];
fs[row]=R>0&&of[7+4*p]>=0?base+of[7+4*p]:nullptr;
}
__syncthreads();
const int t=threadIdx.x,lane=t%32,warp=t/32,g=lane/4,q=lane%4;
const int rank=blockIdx.x%CB,tile=blockIdx.x/CB,count=rows_shape[0];
const T*wr=w+(long(tile-first)*BM+warp*16+g)*K+rank*(K/CB)+8*q;
const T*xr[NT];
#pragma unroll
for(int n=0;n<NT;++n)xr[n]=x+long(min(8*n+g,count-1))*K+rank*(K/CB)+8*q;
float acc[NT][4]={};
for(int k=0;k<K/CB;k+=32*U){
uint4 lo[U],hi[U];
#pragma unroll
for(int u=0;u<U;++u){lo[u]=graft::stream(wr+k+32*u);hi[u]=graft::stream(wr+8*K+k+32*u);}
#pragma unroll
for(int u=0;u<U;++u){
#pragma unroll
for(int n=0;n<NT;++n){
const uint4 v=graft::load(xr[n]+k+32*u);
graft::multiply(acc[n],lo[u].x,hi[u].x,lo[u].y,hi[u].y,v.x,v.y);
graft::multiply(acc[n],lo[u].z,hi[u].z,lo[u].w,hi[u].w,v.z,v.w);
}}}
#pragma unroll
for(int n=0;n<NT;++n){
float*to=&part[8*n+2*q][warp*16+g];
to[0]=acc[n][0];to[BM+4]=acc[n][1];to[8]=acc[n][2];to[BM+12]=acc[n][3];
}
asm volatile("barrier.cluster.arrive.release.aligned;":::"memory");
constexpr int EACH=16/NT;
const int unit=t/EACH,sub=t%EACH,row=unit/2;
const int within=rank*16+unit%2*8;
const long column=long(tile-first)*BM+within;
float s[8]={};
const int R=rs[row];
const float*hp=h+hs[row];
const A*b=bs[row]+column;
#pragma unroll 4
for(int r=sub;r<R;r+=EACH){
float bf[8];
graft::widen(b+long(r)*on,bf);
const float hr=hp[r];
#pragma unroll
for(int e=0;e<8;++e)s[e]+=hr*bf[e];
}
asm volatile("barrier.cluster.wait.acquire.aligned;":::"memory");
float y[8]={};
const auto cluster=cg::this_cluster();
for(int c=sub;c<CB;c+=EACH){
const float4*from=reinterpret_cast<const float4*>(cluster.map_shared_rank(&part[row][within],c));
const float4 p0=from[0],p1=from[1];
y[0]+=p0.x;y[1]+=p0.y;y[2]+=p0.z;y[3]+=p0.w;y[4]+=p1.x;y[5]+=p1.y;y[6]+=p1.z;y[7]+=p1.w;
}
#pragma unroll
for(int d=EACH/2;d>0;d/=2){
#pragma unroll
for(int e=0;e<8;++e){
y[e]+=__shfl_xor_sync(0xffffffffu,y[e],d);
s[e]+=__shfl_xor_sync(0xffffffffu,s[e],d);
}}
asm volatile("barrier.cluster.arrive.release.aligned;":::"memory");
if(sub==0&&row<count){
union{T x[8];uint4 raw;}out;
#pragma unroll
for(int e=0;e<8;++e)out.x[e]=T(float(T(y[e]))+float(T(s[e])));
"""

_STORE = """if(fs[row]){
float f[8];
graft::widen(fs[row]+column,f);
#pragma unroll
for(int e=0;e<8;++e)out.x[e]=T(f[e]*float(out.x[e]));
}
*reinterpret_cast<uint4*>(to+long(row)*on+column)=out.raw;
}
asm volatile("barrier.cluster.wait.acquire.aligned;":::"memory");
"""


# Which projection a cluster, or a block of its own, computes.
_PLACE = """const int n0=table[0]/BM,n1=n0+table[1]/BM,at=blockIdx.x/CB;
const int p=(at>=n0)+(at>=n1),on=table[p],first=p==0?0:p==1?n0:n1;
const T*w=p==0?w0:p==1?w1:w2;
T*to=p==0?o0:p==1?o1:o2;
const int K=table[3],HS=table[4];
"""


TILED_ROWS = (1, 2, 9, 17)  # the least batch for each text of the second kernel


def _row_tiles(rows: int) -> int:
    """How often eight rows the second kernel computes for a batch of `rows`: 1, 2 or 4; 0 for one row."""
    return 0 if rows == 1 else 1 if rows <= 8 else 2 if rows <= 16 else 4


def product_blocks(sizes: Sequence[int], rows: int) -> int:
    """How many blocks of THREADS the second kernel takes for layers of these output sizes."""
    return sum(sizes) // _VECTOR_OUTPUTS if rows == 1 else sum(sizes) // OUTPUTS_PER_CLUSTER * _CLUSTER_BLOCKS


def unrolled(in_size: int) -> int:
    """How many vectors a thread may read ahead: the text is the same for sizes for which it is."""
    return next(count for count in (4, 2, 1) if in_size // INPUTS_MULTIPLE % count == 0)


def shrink_source(dtype: mx.Dtype, factors: mx.Dtype, stacks: int) -> Text:
    """The text of the kernel that computes h = weight·A x (B, rank), in float32.

    From x of `dtype`, at most so many slabs of `factors`, and the arrays of a launch. The grid is
    (THREADS·rank/SHRINK_RANKS, B, 1), in groups of THREADS.
    """
    header = _HEADER + "}\n" + _ATTRIBUTES.format(threads=THREADS, blocks=4, cluster="")
    body = _types(dtype, factors) + f"constexpr int RB={SHRINK_RANKS},TH={THREADS};\n" + _SHRINK
    return named("shrink", header, body.replace("BASE", of_stack(stacks)))


def product_source(dtype: mx.Dtype, factors: mx.Dtype, stacks: int, rows: int, in_size: int) -> Text:
    """The text of the kernel that computes the outputs from x, h, slabs, the arrays of a launch and weights.

    The grid is (THREADS·product_blocks, 1, 1), in groups of THREADS. The text is the same for 2 to 8 rows,
    for 9 to 16 and for 17 to 32, and for most input sizes.
    """
    tiles = _row_tiles(rows)
    if tiles == 0:
        own, resident, cluster = "", 4, ""
        per, blocks, unroll, last = _VECTOR_OUTPUTS, 1, 2, _VECTOR
    else:
        own, resident = _MULTIPLY.replace("KIND", _KINDS[dtype]), 3
        cluster = f"__attribute__((cluster_dims({_CLUSTER_BLOCKS},1,1)))"
        per, blocks, unroll, last = OUTPUTS_PER_CLUSTER, _CLUSTER_BLOCKS, 4, _PRODUCT + _STORE
    unroll = min(unroll, unrolled(in_size))
    header = _HEADER + _STREAM + own + "}\n"
    header += _ATTRIBUTES.format(threads=THREADS, blocks=resident, cluster=cluster)
    constants = f"constexpr int NT={tiles},U={unroll},CB={blocks},BM={per};\n"
    body = _types(dtype, factors) + constants + _PLACE + last
    return named("product", header, body.replace("BASE", of_stack(stacks)))


def _types(dtype: mx.Dtype, factors: mx.Dtype) -> str:
    return f"""using T={TYPES[dtype]};
using A={TYPES[factors]};
constexpr int START={TABLE_START},NUMBERS={STACK_NUMBERS};
"""
