# Completion of runx for bash 4.1 and later: "runx completion bash" prints this.
_runx() {
    local line=${COMP_LINE:0:COMP_POINT} current= kind= value
    COMPREPLY=()
    while IFS=$'\t' read -r kind value _; do
        case $kind in
        current) current=$value ;;
        word) COMPREPLY+=("$value") ;;
        files) compopt -o filenames 2>/dev/null
            mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -f -- "$current") ;;
        directories) compopt -o filenames 2>/dev/null
            mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -d -- "$current") ;;
        programs) mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -c -- "$current") ;;
        esac
    done < <("${COMP_WORDS[0]}" __complete bash "$line" "$COMP_WORDBREAKS" 2>/dev/null)
}
complete -F _runx runx
