#!/bin/sh
# Triton Inference Server without a container, for tests/test_triton_server.py: sh tests/triton_server.sh FOLDER PYTHON
#
# FOLDER/pytriton/tritonserver: the server, its python backend and the backend's stub for this version of Python. The wheel of
# nvidia-pytriton that carries them is only unpacked: installed, it would bring numpy 1, which this stub needs, as it reads the
# arrays of numpy 2 wrongly (python_backend#384, mended in Triton 2.52).
# FOLDER/env: for the server's processes, the packages of PYTHON, but numpy 1.
# FOLDER holds all this when the script has ended well, else what it held before.
set -eu

folder=$1
python=$2
partial=$folder.partial

unpack() { # REQUIREMENT FOLDER: a wheel, without what it requires
    "$python" -m pip download -q --disable-pip-version-check --no-deps --only-binary :all: -d "$partial/wheel" "$1"
    "$python" -m zipfile -e "$partial"/wheel/*.whl "$2"
    rm -r "$partial/wheel"
}

rm -rf "$partial"
mkdir -p "$partial"
unpack nvidia-pytriton==0.7.0 "$partial"
server=$partial/pytriton/tritonserver
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
stub=$server/backends/python/triton_python_backend_stub
cp "$server/python_backend_stubs/$version/triton_python_backend_stub" "$stub" # it is looked for there
chmod +x "$server/bin/tritonserver" "$stub"
libraries=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')
if LD_LIBRARY_PATH=$libraries ldd "$server/bin/tritonserver" "$stub" | grep 'not found'; then
    echo "Triton cannot start without these; of libpython: apt-get install libpython$version, or a Python with --enable-shared" >&2
    exit 1
fi

"$python" -m venv --without-pip "$partial/env"
packages=$partial/env/lib/python$version/site-packages
unpack 'numpy<2' "$packages"
"$python" -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > "$packages/all.pth"

rm -rf "$folder"
mv "$partial" "$folder"
