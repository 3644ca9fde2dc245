;; Prints its arguments, the variables of its environment that begin with the letter G, and a file of its
;; root filesystem, through WASI preview 1 and with no library at all.
(module
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $environ_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))

  ;; 0: an iovec; 8, 12, 16 and 20: results; 64: texts; 4096: pointers; 32768: strings, or what a file holds.
  (memory (export "memory") 2)
  (data (i32.const 64) "Hello from a WebAssembly module.\n")
  (data (i32.const 128) "  argument  ")
  (data (i32.const 144) "  variable  ")
  (data (i32.const 160) "  file      ")
  (data (i32.const 176) "\n")
  (data (i32.const 192) "message.txt")

  ;; Ends the program with an exit code of its own if a call failed.
  (func $check (param $errno i32)
    (if (local.get $errno) (then (call $proc_exit (i32.const 70)))))

  ;; Writes to standard output, all of it.
  (func $print (param $text i32) (param $length i32)
    (block $done
      (loop $more
        (br_if $done (i32.eqz (local.get $length)))
        (i32.store (i32.const 0) (local.get $text))
        (i32.store (i32.const 4) (local.get $length))
        (call $check (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
        (local.set $text (i32.add (local.get $text) (i32.load (i32.const 8))))
        (local.set $length (i32.sub (local.get $length) (i32.load (i32.const 8))))
        (br $more))))

  (func $length (param $text i32) (result i32)
    (local $end i32)
    (local.set $end (local.get $text))
    (block $done
      (loop $more
        (br_if $done (i32.eqz (i32.load8_u (local.get $end))))
        (local.set $end (i32.add (local.get $end) (i32.const 1)))
        (br $more)))
    (i32.sub (local.get $end) (local.get $text)))

  ;; Prints the strings that the pointers at 4096 lead to, a line each after a label of twelve bytes; with
  ;; a letter given only those that begin with it.
  (func $print_list (param $count i32) (param $label i32) (param $letter i32)
    (local $at i32) (local $text i32)
    (local.set $at (i32.const 4096))
    (block $done
      (loop $more
        (br_if $done (i32.eqz (local.get $count)))
        (local.set $text (i32.load (local.get $at)))
        (if (i32.or
              (i32.eqz (local.get $letter))
              (i32.eq (local.get $letter) (i32.load8_u (local.get $text))))
          (then
            (call $print (local.get $label) (i32.const 12))
            (call $print (local.get $text) (call $length (local.get $text)))
            (call $print (i32.const 176) (i32.const 1))))
        (local.set $at (i32.add (local.get $at) (i32.const 4)))
        (local.set $count (i32.sub (local.get $count) (i32.const 1)))
        (br $more))))

  ;; Prints message.txt. Descriptor 3 is the root directory.
  (func $print_file
    (call $check
      (call $path_open
        (i32.const 3) (i32.const 0) (i32.const 192) (i32.const 11)
        (i32.const 0) (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 12)))
    (call $print (i32.const 160) (i32.const 12))
    (block $done
      (loop $more
        (i32.store (i32.const 0) (i32.const 32768))
        (i32.store (i32.const 4) (i32.const 4096))
        (call $check (call $fd_read (i32.load (i32.const 12)) (i32.const 0) (i32.const 1) (i32.const 8)))
        (br_if $done (i32.eqz (i32.load (i32.const 8))))
        (call $print (i32.const 32768) (i32.load (i32.const 8)))
        (br $more))))

  (func (export "_start")
    (call $print (i32.const 64) (i32.const 33))
    (call $check (call $args_sizes_get (i32.const 16) (i32.const 20)))
    (call $check (call $args_get (i32.const 4096) (i32.const 32768)))
    (call $print_list (i32.load (i32.const 16)) (i32.const 128) (i32.const 0))
    (call $check (call $environ_sizes_get (i32.const 16) (i32.const 20)))
    (call $check (call $environ_get (i32.const 4096) (i32.const 32768)))
    (call $print_list (i32.load (i32.const 16)) (i32.const 144) (i32.const 71))
    (call $print_file)))
